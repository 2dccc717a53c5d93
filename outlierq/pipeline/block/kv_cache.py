"""The scales of one block's KV cache: from what attention saw, moved along with folds into the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from outlierq.calibrate.groups import NOT_RUN
from outlierq.core.errors import StatsError
from outlierq.core.measured.block_stats import BlockStats
from outlierq.core.model import Fold, InputGroup
from outlierq.core.scheme import CacheScheme
from outlierq.quantize.kv_cache import cache_scale

if TYPE_CHECKING:
    import torch

    from outlierq.pipeline.planning.plan import CachePlan


def cache_tensors(
    cache: CachePlan,
    scheme: CacheScheme,
    stats: BlockStats | None,
    groups: Sequence[InputGroup],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """`k_scale` and `v_scale` by tensor name, each [1], or [kv heads, 1, 1].

    before, after: the block's tensors without and with its transforms. A transform may scale the values (the fold of
    the input of the output projection); it leaves keys as they are.
    """
    if groups and all(group.fold_note == NOT_RUN for group in groups):
        raise StatsError(
            f"nothing is known of the keys and values of {cache.prefix}: {NOT_RUN}",
            hint="set calibration.images, or leave kv_cache out for this model",
        )
    if stats is None:
        raise StatsError(
            "the statistics hold nothing of the keys and values of this block", hint="calibrate again with this version"
        )
    key, value = stats.need("key_abs_max"), stats.need("value_abs_max")
    for group in groups:
        fold = group.fold
        if fold is not None and fold.kind == "linear" and fold.weight.startswith(f"{cache.prefix}."):
            value = moved_values(value, fold, before, after)
    scales = {name: cache_scale(x, scheme, dtype).cpu() for name, x in zip(cache.names, (key, value), strict=True)}
    for name, scale in scales.items():
        if tuple(scale.shape) != cache.shape:
            raise StatsError(
                f"{name} was planned as {list(cache.shape)}, but attention has {len(key)} key-value heads",
                hint="use kv_cache.per: tensor",
            )
    return scales


def moved_values(
    abs_max: torch.Tensor, fold: Fold, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """abs_max [kv heads, D] of values whose producer was folded: (|v| + |shift|) / scale, an upper bound.

    The scale of a producer channel is told from its row of weights. With grouped queries the fold repeats a value
    channel for each query head; the first of them stands for all.
    """
    import torch

    rows = [weights[fold.weight].float().to(abs_max.device) for weights in (before, after)]
    old, new = (w.T if fold.transposed else w for w in rows)
    norms = new.norm(dim=1)
    scale = torch.where(norms > 0, old.norm(dim=1) / norms, torch.ones_like(norms))
    shift = torch.zeros_like(scale)
    if fold.bias is not None:
        shift = before[fold.bias].float().to(scale.device) - scale * after[fold.bias].float().to(scale.device)
    heads, size = abs_max.shape
    repeats = len(fold.index) // (heads * size)
    index = torch.tensor(fold.index, device=abs_max.device).view(heads, repeats, size)[:, 0]
    return (abs_max + shift[index].abs()) / scale[index]
