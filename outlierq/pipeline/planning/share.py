"""How much of a model's linear layers a plan quantizes: of mixtures that stay in 16 bits one would not see it else."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import TYPE_CHECKING

from outlierq.core.dtypes import WEIGHT_DTYPES
from outlierq.export.declared import is_table
from outlierq.recipe.patterns import HEAD, tower_of

if TYPE_CHECKING:
    from outlierq.core.model import LinearSite, StudiedModel, TensorInfo

# A matrix has at least so many rows and columns; what is smaller (kernels of convolutions, states) is none of a linear.
LEAST = 32
# Said first, below this.
MOST = 0.9


def linear_weights(model: StudiedModel) -> dict[str, int]:
    """Stored tensor -> number of weights, of every matrix that hidden states go through, whether it is a known linear
    or not (fused experts, blocks that the class does not have). Without embeddings, the output head, routers, towers.
    """
    import torch

    sites = {site.weight: site for site in model.structure.sites}
    modules = (name for name, part in model.skeleton.named_modules() if isinstance(part, torch.nn.Embedding))
    tables = {model.names.get(f"{name}.weight") for name in modules}
    counts = {}
    for name, info in model.checkpoint.tensors.items():
        if name in sites:
            is_counted = not _is_aside(sites[name])
        else:
            is_counted = _is_matrix(info) and name not in tables and not is_table(name) and not _is_outside(name)
        if is_counted:
            counts[name] = prod(info.shape)
    return counts


def _is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor can be the weight of a linear, or those of several."""
    return info.dtype in WEIGHT_DTYPES and len(info.shape) in (2, 3) and min(info.shape[-2:]) >= LEAST


def _is_aside(site: LinearSite) -> bool:
    """Whether a linear is a router, the output head, or a part of a tower."""
    return site.kind == "Router" or site.tower is not None or _is_outside(site.weight) or _is_outside(site.module)


def _is_outside(name: str) -> bool:
    """Whether a tensor or module belongs to a tower or is the output head, by its name."""
    module = name.removesuffix(".weight")
    return module.rpartition(".")[2] == HEAD or tower_of(module) is not None


def quantized_share(model: StudiedModel, quantized: Collection[LinearSite]) -> float:
    """Share of those weights that is quantized, 0..1; 1 where there is none."""
    counts = linear_weights(model)
    total = sum(counts.values())
    return sum(counts.get(site.weight, 0) for site in quantized) / total if total else 1.0


def share_note(share: float) -> list[str]:
    """What is to be said first of a plan that leaves much in 16 bits."""
    if share >= MOST:
        return []
    return [f"only {share:.0%} of the weights of the linear layers are quantized; the rest stays in 16 bits"]
