"""Is what the config calls quantized what is stored quantized? Asked of the file, of our class, and of the config's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.export.declared import plain_modules, tables
from outlierq.load.model.experts.apart import as_stored
from outlierq.load.packed.described import fits, is_excluded
from outlierq.pipeline.checking.finding import Findings, listed

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

CHECK = "config"
# Tensors of experts that are stored one by one, whatever their class does: readers of packed weights take them apart.
APART = re.compile(r"(.*\.experts)\.\d+\.")
# Methods that mean the output head, too, unless they name it.
ALL_LINEARS = ("bitsandbytes", "outlierq", "outlierq-olive")


def check_declared(
    plain: Checkpoint, config: Mapping[str, Any], skeleton: Any, names: Mapping[str, str], findings: Findings
) -> None:
    """What config.json says of each matrix is what is stored: packed or plain, with zero points or without.

    plain: the decoded checkpoint. skeleton, names: the class that outlierq builds, None and empty when it cannot.
    """
    linears = _linears(skeleton, names)
    for module, tensor in linears.items():
        _check_linear(module, tensor, plain.packed, config, findings)
    spoken_for = {*linears.values(), *(() if skeleton is None else tables(skeleton, names))}
    for stem in plain_modules(plain.tensors, plain.packed, spoken_for):
        if _is_target(config, stem) and not _is_kept(config, stem):
            what = "is stored plain and is no linear of the model class, but config.json does not say so"
            findings.fault(CHECK, stem, what)
    for name, linear in plain.linears.items():
        if linear.symmetric and "weight_zero_point" in linear.members:
            findings.fault(CHECK, name, "has stored zero points, but config.json says that it is symmetric")


def check_class(plain: Checkpoint, config: Mapping[str, Any], findings: Findings) -> None:
    """The class that `architectures` names is built without weights, and asked for its linears: each must be stored as
    config.json says. It may be another one than that of the language model alone, with a vision tower for example.
    """
    from outlierq.load import declared_class

    try:
        built = declared_class(as_stored(plain))
    except SourceError as error:
        findings.fault(CHECK, "", error.what)
        return
    if built is None:
        return
    skeleton, names = built
    for module, tensor in _linears(skeleton, names).items():
        _check_linear(module, tensor, plain.packed, config, findings)
    apart = {name[: found.end(1)] for name in plain.tensors if (found := APART.match(name))}
    needed = (name for name, _ in skeleton.named_parameters(remove_duplicate=False) if name not in names)
    lost = [name for name in needed if name.rpartition(".")[0] not in apart]
    if lost and len(lost) < len(names):
        findings.fault("tensors", "", f"{type(skeleton).__name__} has parameters that are not stored: {listed(lost)}")


def _linears(skeleton: torch.nn.Module | None, names: Mapping[str, str]) -> dict[str, str]:
    """Module -> stored weight of every linear of a class."""
    import torch

    if skeleton is None:
        return {}
    modules = {name for name, part in skeleton.named_modules() if isinstance(part, torch.nn.Linear)}
    return {name: names[f"{name}.weight"] for name in modules if f"{name}.weight" in names}


def _check_linear(
    module: str, tensor: str, packed: Collection[str], config: Mapping[str, Any], findings: Findings
) -> None:
    """One linear: its module in the class, and the stored tensor."""
    stem = tensor.removesuffix(".weight")
    meant = _is_target(config, module) and not (_is_kept(config, module) or _is_kept(config, stem))
    if meant and tensor not in packed and (stem == module or not _shares_a_table(stem)):
        findings.fault(CHECK, tensor, "is stored plain, but config.json does not say so")
    elif not meant and tensor in packed:
        findings.fault(CHECK, tensor, "is stored quantized, but config.json says that it is not")


def _shares_a_table(stem: str) -> bool:
    """Whether the tensor of a linear is that of an embedding, by its name: a tied head."""
    return "embed" in stem or stem.rpartition(".")[2] in ("wte", "word_embeddings")


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether a linear layer is meant to be quantized before exceptions are looked at."""
    if config.get("quant_method") == "compressed-tensors":
        targets = [t for group in (config.get("config_groups") or {}).values() for t in group.get("targets", [])]
        return any(
            fits(t.removeprefix("re:"), module) if t.startswith("re:") else t in ("Linear", module) for t in targets
        )
    if config.get("quant_method") in ALL_LINEARS:
        return True
    # Others mean the linears of the blocks; blocks are numbered.
    inside = any(piece.isdigit() for piece in module.split("."))
    return inside or bool(config.get("lm_head"))


def _is_kept(config: Mapping[str, Any], module: str) -> bool:
    """Whether the quantization config names a module as one that is not quantized."""
    if config.get("quant_method") == "compressed-tensors":
        entries = config.get("ignore") or []
        return any(fits(e.removeprefix("re:"), module) if e.startswith("re:") else e == module for e in entries)
    return is_excluded(config, module)
