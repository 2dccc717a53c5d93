"""What a checkpoint stores plain, by its names on disk: the one source of every list of kept modules.

A format's config names what is not quantized, and readers take the rest for quantized. So the list is made of what the
file holds, and not of the class that outlierq builds: classes leave out vision towers and blocks for the prediction of
further tokens, and a reader that builds them looks for codes that are not there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from outlierq.core.model import MADE_OF, LinearSite, StudiedModel, TensorInfo
from outlierq.core.scheme import QuantScheme

if TYPE_CHECKING:
    import torch

WEIGHT = ".weight"
# Matrices that no linear has, by a part of their names.
TABLES = ("embed", "wte", "wpe", "norm")


def kept_modules(model: StudiedModel, sites: Sequence[tuple[LinearSite, QuantScheme | None]]) -> list[str]:
    """Every module that is stored plain and that a reader might take for a quantized one.

    sites: every linear with its scheme, None when kept. First the kept linears of the class, each by its name in
    transformers and where that differs by that on disk, as other runtimes build their models by it; then those that
    share a tensor (a tied head) or are made of parts of others, then what is no linear of the class, which may be one
    in another program.
    """
    plain = [name for site, scheme in sites if scheme is None for name in names_of(site)]
    packed = [site.weight for site, scheme in sites if scheme is not None]
    tied = [slot.removesuffix(WEIGHT) for slot, tensor in model.structure.tied if tensor not in packed]
    spoken_for = {site.weight for site, _ in sites} | tables(model.skeleton, model.names)
    others = plain_modules(model.checkpoint.tensors, packed, spoken_for)
    made = made_linears(model.skeleton, model.names, packed)
    return list(dict.fromkeys([*plain, *tied, *made, *others, *stacks(model.skeleton, model.names)]))


def made_linears(model: torch.nn.Module, names: Mapping[str, str], packed: Collection[str]) -> list[str]:
    """Linears of a class whose weights are made of other tensors as they are loaded, none of which is quantized.

    names: parameter -> stored tensor. packed: stored names of the quantized weights.
    """
    import torch

    packed, made = set(packed), []
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and f"{name}{WEIGHT}" not in names:
            pieces = getattr(part, MADE_OF, {}).get(WEIGHT.removeprefix("."), ())
            if not packed & {names.get(piece) for piece in pieces}:
                made.append(name)
    return made


def stacks(model: torch.nn.Module, names: Mapping[str, str]) -> dict[str, list[str]]:
    """Module -> its stored tensors that hold a matrix of every expert at once. names: parameter -> stored tensor.

    Every parameter of three dimensions is one but the kernels of convolutions, whatever its class is called.
    """
    from torch.nn.modules.conv import _ConvNd

    held: dict[str, list[str]] = {}
    for name, part in model.named_modules():
        for slot, parameter in part._parameters.items():
            tensor = names.get(f"{name}.{slot}")
            if tensor and parameter is not None and parameter.dim() == 3 and not isinstance(part, _ConvNd):
                held.setdefault(name, []).append(tensor)
    return held


def tables(model: torch.nn.Module, names: Mapping[str, str]) -> set[str]:
    """Stored names of the weights that no reader takes for a linear's: of embeddings and of Conv1D (GPT-2).

    names: parameter -> stored tensor.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    modules = (name for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding | Conv1D))
    return {names[f"{name}{WEIGHT}"] for name in modules if f"{name}{WEIGHT}" in names}


def names_of(site: LinearSite) -> list[str]:
    """Names of a linear: in transformers, and where it differs on disk."""
    return list(dict.fromkeys([site.module, site.weight.removesuffix(WEIGHT)]))


def plain_modules(tensors: Mapping[str, TensorInfo], packed: Collection[str], spoken_for: Collection[str]) -> list[str]:
    """Modules that hold a matrix without codes which is neither a linear of the model class nor an embedding.

    In file order: what the class does not know, and what it computes with in another way (a router's parameter).
    tensors: what is stored, with a plain header for each quantized weight. packed: names of quantized weights.
    spoken_for: stored names of the class's linears, which whoever asks lists, and of its embeddings. Matrices of three
    dimensions are the experts of a mixture, stored together: readers decide for their module.
    """
    packed, spoken_for = set(packed), set(spoken_for)
    modules = []
    for name, info in tensors.items():
        if name in packed or name.endswith((".bias", "_bias")):
            continue
        if len(info.shape) == 3 and ".experts." in name:
            modules.append(name.removesuffix(WEIGHT).rpartition(".")[0])
        elif name not in spoken_for and len(info.shape) == 2 and name.endswith(WEIGHT) and not is_table(name):
            modules.append(name.removesuffix(WEIGHT))
    return list(dict.fromkeys(modules))


def holds_experts(module: str) -> bool:
    """Whether a kept module holds the experts of a mixture in one tensor, so that all below its name is kept."""
    return module.rpartition(".")[2] == "experts"


def is_table(name: str) -> bool:
    """Whether a matrix is an embedding or belongs to a norm, by its name."""
    return any(part in name.removesuffix(WEIGHT).rpartition(".")[2] for part in TABLES)
