"""One input group's transform: choose a scale, make it storable, fold its inverse into the producer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.folds import apply_fold
from outlierq.core.model import Checkpoint, Fold, InputGroup
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load.shards import torch_dtype
from outlierq.pipeline.output import as_matrix, from_matrix
from outlierq.transform.stage import choose_scale, storable_scale

if TYPE_CHECKING:
    import torch

    from outlierq.registry import Method


def transform_group(
    group: InputGroup,
    stats: InputStats,
    scheme: QuantScheme,
    tensors: dict[str, torch.Tensor],
    steps: Sequence[tuple[Method, dict[str, Any]]],
    checkpoint: Checkpoint,
) -> tuple[InputStats, dict[str, Any]]:
    """Rewrite (weights, statistics) of one group so that its input is divided by a scale; both stay consistent.

    tensors: the block's tensors; the dict gets new float32 tensors for producer and consumers. Returns the new
    statistics and a row for the report; its "folded" names the producer's tensors.
    """
    import torch

    row: dict[str, Any] = {"group": group.name, "method": "+".join(m.name for m, _ in steps), "note": group.fold_note}
    if group.fold is None:
        return stats, {**row, "fold": None, "folded": []}
    fold = group.fold
    weights = {s: as_matrix(s, tensors[s.weight].float()) for s in group.sites}
    tie = torch.tensor(fold.index, device=next(iter(weights.values())).device)
    scale = choose_scale(torch.cat(list(weights.values())), stats, scheme, tie, steps, group.name)
    producer = {n: tensors[n].float() for n in (fold.weight, fold.bias) if n}
    scale = _exact(scale, fold, producer[fold.weight], tie, torch_dtype(checkpoint.tensors[fold.weight].dtype))
    tensors |= apply_fold(producer, fold, scale)
    tensors |= {s.weight: from_matrix(s, w * scale) for s, w in weights.items()}
    spread = {"scale_min": scale.min().item(), "scale_max": scale.max().item()}
    return stats.scaled(scale), {**row, "fold": fold.weight, "folded": list(producer), **spread}


def _exact(
    scale: torch.Tensor, fold: Fold, weight: torch.Tensor, tie: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """For a norm, the nearby scale that its 16-bit weight can hold without rounding; linears are rounded anyway."""
    if fold.kind == "linear":
        return scale
    offset = 1.0 if fold.kind == "offset-norm" else 0.0
    return storable_scale((weight + offset)[tie], scale, dtype, offset)
