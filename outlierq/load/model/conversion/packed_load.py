"""Whether transformers can load a checkpoint whose weights are packed: tried on its class, without a weight.

Some things go wrong, each in some classes: modules share a weight, but not its scales; the code that initialises what
a checkpoint lacks reads the weight of a linear, which a packed one has under another name; a parameter that is joined
of several stored tensors is expected packed in all of them, so that plain ones are dropped; packed ones are joined as
if words were weights; no table is made that splits one; what the class keeps in float32 is named so that scales are
meant, too, and weights come out of them in float32; and a buffer is given another dtype by the model's forward, which
compressed-tensors does not let it. All are asked of the class and of transformers' own conversion table, never of a
list of models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.load.model.architecture import declared_class
from outlierq.load.model.decoder import block_list
from outlierq.load.model.skeleton import config_errors, leave_empty

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint, StudiedModel

WEIGHT = "weight"


@dataclass(frozen=True)
class LoadFault:
    """Why transformers does not load packed weights, and whether it would if it decoded them while it loads."""

    why: str
    loads_dense: bool


def packed_fault(
    studied: StudiedModel,
    quantized: Collection[str],
    packed: Collection[str],
    added: Collection[str] = (),
    *,
    is_fp8: bool = False,
) -> LoadFault | None:
    """What keeps transformers from loading the result; None where nothing is known to.

    quantized: stored names of the weights that have scales. packed: of those that the result holds under other names.
    is_fp8: all of them are; then it joins plain tensors, too, instead of dropping them. added: names that the result
    holds beside those of the source, where compressed-tensors runs it.
    """
    checkpoint = studied.checkpoint
    shared = next((tensor for _, tensor in studied.structure.tied if tensor in set(quantized)), None)
    if shared is not None:
        return LoadFault(f"several of its modules share {shared}, and it has them share no scales", True)
    transposed = [site for site in studied.structure.sites if site.transposed and site.weight in set(quantized)]
    if transposed:
        why = f"it has no packed layer for a {transposed[0].kind} such as {transposed[0].module}"
        return LoadFault(why, len(transposed) == len(set(quantized)))
    try:
        built = declared_class(checkpoint) if quantized else None
    except SourceError:  # said by whoever verifies the result
        return None
    if built is None:
        return None
    model, names = built
    split = _unsplit(model, {slot for slot, tensor in names.items() if tensor in set(quantized)})
    if split is not None:
        named = split.replace("\\", "").strip(".")
        return LoadFault(f"it splits {named} as it loads, which it cannot do in compressed checkpoints", False)
    fault = _conversion_fault(model, checkpoint, set(checkpoint.tensors if is_fp8 else quantized), set(packed))
    if fault is not None:
        return fault
    if packed and _initialises(model) and not _initialises(_without_weights(model, names, set(packed))):
        return LoadFault(f"{type(model).__name__} initialises weights by a name that packed ones do not have", True)
    misnamed = _misnamed(model, names, set(quantized), added)
    if misnamed is not None:
        return LoadFault(f"it has another name for {misnamed[0]}, and does not know {misnamed[1]} by that", False)
    widened = _widened(model, added, checkpoint.dtype)
    if widened is not None:
        return LoadFault(
            f"its class keeps what is named like {widened} in float32, and so the weight made of it", False
        )
    retyped = _retyped(model, checkpoint.dtype) if added else None
    if retyped is not None:
        return LoadFault(
            f"{type(model).__name__} gives {retyped} its dtype as it runs, which compressed-tensors prevents", True
        )
    return None


def _misnamed(
    model: Any, names: Mapping[str, str], quantized: Collection[str], added: Collection[str]
) -> tuple[str, str] | None:
    """A stored weight that transformers renames, and a tensor beside it that it does not: its table ends in "weight".

    names: parameter -> stored tensor. One of each kind is looked at: the numbers of blocks and experts change nothing.
    What transformers converts is left out: it does so with all that is beside.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    owners = {tensor.rpartition(".")[0]: slot for slot, tensor in names.items() if tensor in quantized}
    of_kind = {re.sub(r"\d+", "0", name): name for name in reversed(list(added))}  # the first of each
    for name in of_kind.values():
        owner, _, leaf = name.rpartition(".")
        tensor, slot = f"{owner}.{WEIGHT}", owners.get(owner, "")
        renamed, pattern = rename_source_key(tensor, renamings, converters)
        meant = f"{renamed.rpartition('.')[0]}.{leaf}"
        if slot not in ("", tensor) and pattern is None and rename_source_key(name, renamings, [])[0] != meant:
            return tensor, name
    return None


def _widened(model: Any, added: Collection[str], dtype: str) -> str | None:
    """A tensor beside a packed weight that transformers brings to float32, as the class asks for all of such a name."""
    from transformers.core_model_loading import build_glob_alternation

    strict = list(model._keep_in_fp32_modules_strict or ()) if dtype in ("bfloat16", "float16") else []
    wide = [*strict, *(model._keep_in_fp32_modules or ())] if dtype == "float16" else strict
    if not wide:
        return None
    pattern = build_glob_alternation(wide)[0]
    return next((name for name in added if name.endswith("_scale") and pattern.search(name)), None)


class _Enough(Exception):
    """Raised where the first block begins."""


def _retyped(model: torch.nn.Module, dtype: str) -> str | None:
    """A buffer whose dtype the model changes before its first block runs. Changes the model."""
    import torch

    def stop(*_: Any) -> None:
        raise _Enough

    try:
        handle = block_list(model)[1][0].register_forward_pre_hook(stop)
    except SourceError:
        return None
    leave_empty(model, getattr(torch, dtype), "cpu")
    before = {name: buffer.dtype for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    except (_Enough, *config_errors(), ImportError, AssertionError):  # also what a class cannot do without weights
        pass
    finally:
        handle.remove()
    return next(
        (name for name, buffer in model.named_buffers() if buffer.dtype != before.get(name, buffer.dtype)), None
    )


def _unsplit(model: torch.nn.Module, scaled: Collection[str]) -> str | None:
    """What a conversion splits that transformers makes no table for: it has one for scales only where the first part
    has scales. scaled: names of the parameters that have them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for step in get_model_conversion_mapping(model):
        if isinstance(step, WeightConverter) and _takes_packed(step) and len(step.target_patterns) > 1:
            part = re.compile(f"{step.target_patterns[0]}$")
            if not any(part.search(name) for name in scaled):
                return str(step.source_patterns[0])
    return None


def _conversion_fault(
    model: torch.nn.Module, checkpoint: Checkpoint, quantized: Collection[str], packed: Collection[str]
) -> LoadFault | None:
    """What transformers cannot convert in a compressed checkpoint of a class. Names are those of `packed_fault`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    converters = [step for step in steps if isinstance(step, WeightConverter) and _takes_packed(step)]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    slots = model.state_dict(keep_vars=True)
    for tensor in checkpoint.tensors if converters else ():
        slot, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix or None, slots)
        if pattern is None or slot not in slots or tensor in slots:
            continue
        if tensor not in quantized:
            return LoadFault(f"it drops {tensor}, which it joins with others, from packed checkpoints", False)
        # Asked to decode them while it loads, it stacks each instead.
        if tensor in packed and _is_linear(model, slot):
            return LoadFault(f"it joins {tensor} with others, and cannot join packed weights", False)
    return None


def _is_linear(model: torch.nn.Module, slot: str) -> bool:
    """Whether a parameter belongs to a linear layer, which is packed itself in a packed checkpoint."""
    import torch

    return isinstance(model.get_submodule(slot.rpartition(".")[0]), torch.nn.Linear)


def _takes_packed(step: Any) -> bool:
    """Whether transformers has a conversion decode its tensors first: all of them are called weights."""
    return all(pattern.endswith(f".{WEIGHT}") for pattern in step.source_patterns)


def _without_weights(model: torch.nn.Module, names: dict[str, str], packed: Collection[str]) -> torch.nn.Module:
    """The model, its packed linears without their weights. Changes it."""
    import torch

    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and names.get(f"{name}.{WEIGHT}") in packed:
            part._parameters.pop(WEIGHT, None)
    return model


def _initialises(model: Any) -> bool:
    """Whether the class's code for what a checkpoint lacks runs when it lacks nothing."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for part in model.modules():
        part._is_hf_initialized = False
    try:
        with torch.no_grad():
            model.initialize_weights()
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return True
