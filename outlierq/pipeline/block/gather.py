"""Brings the outlier channels of a block's inner inputs to the end, where a permutation costs nothing.

Which rows may be put into another order is tried out, not listed: a candidate is taken when the block's float32 output
stays the same with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import NumbersError, during
from outlierq.core.model import Block, InputGroup, LinearSite, as_matrix, from_matrix
from outlierq.core.move import trace_of_order
from outlierq.core.stats import InputStats
from outlierq.transform.gather_outliers import last_in_runs

if TYPE_CHECKING:
    import torch

    from outlierq.registry import Method

# Statistics by channel in their last dimension; the hessian has channels in both, the histogram in its first.
BY_CHANNEL = (
    "min", "max", "sum_x", "sum_abs", "sum_sq", "sum_cube", "sum_fourth", "count_large", "count_huge",
    "sequence_large", "first_abs_max", "rows", "first_rows",
)  # fmt: skip

# Raises NumbersError when the block's output differs between two sets of its tensors.
Check = Callable[[Mapping[str, "torch.Tensor"], Mapping[str, "torch.Tensor"]], None]


def gather(
    block: Block,
    groups: Sequence[InputGroup],
    stats: Mapping[str, InputStats],
    tensors: dict[str, torch.Tensor],
    step: tuple[Method, Mapping[str, Any]],
    head_dim: int | None,
    check: Check,
) -> tuple[dict[str, InputStats], list[dict[str, Any]]]:
    """Permute every group whose producer is a linear; `tensors` get the new weights. New statistics, report rows.

    tensors: by name, new ones in the same shape. head_dim: width of an attention head, None when the model has none.
    """
    method, options = step
    done, rows = dict(stats), []
    for group in groups:
        if group.fold is None or group.fold.kind != "linear":
            continue
        row = {"block": block.index, "group": group.name, "method": method.name, "fold": group.fold.weight}
        if not (group.name in stats and stats[group.name].tokens):
            rows.append({**row, "note": "left as it is: no token reached it during calibration", "folded": []})
            continue
        with during(f"transform {method.name}", group.name):
            columns = method.function(stats[group.name], **options)
        for producers, width, channels, order in _candidates(block, groups, group, columns, head_dim):
            changed = _permuted(group, producers, channels, order, tensors)
            try:
                check(tensors, {**tensors, **changed})
            except NumbersError:
                continue
            tensors |= changed
            done[group.name] = permuted_stats(stats[group.name], channels)
            end = "the end" if width == len(channels) else "the ends of their heads"
            note = f"{len(columns)} channels moved to {end}"
            trace = trace_of_order(group, producers, columns.tolist(), width)
            rows.append({**row, "note": note, "folded": list(changed), "trace": trace})
            break
        else:
            rows.append({**row, "note": "no order of the producer's rows leaves the output as it is", "folded": []})
    return done, rows


def _candidates(
    block: Block, groups: Sequence[InputGroup], group: InputGroup, columns: torch.Tensor, head_dim: int | None
) -> Iterator[tuple[list[LinearSite], int, torch.Tensor, torch.Tensor]]:
    """(producers, width of a run, order of channels, order of rows): any order first, then orders inside of heads.

    With a gated activation the rows of both halves go together: all linears beside the producer that have its shape.
    """
    import torch

    index = torch.tensor(group.admitted.index)
    producer = next((site for site in block.sites if site.weight == group.admitted.weight), None)
    if producer is None:
        return
    beside = next(g.sites for g in groups if producer in g.sites)
    together = [s for s in beside if (s.out_features, s.expert) == (producer.out_features, producer.expert)]
    for width in dict.fromkeys(w for w in (len(index), head_dim) if w):
        orders = last_in_runs(columns, index, width)
        if orders is not None:
            for producers in [together, [producer]] if len(together) > 1 else [[producer]]:
                yield producers, width, *orders


def _permuted(
    group: InputGroup,
    producers: Sequence[LinearSite],
    channels: torch.Tensor,
    order: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors with the producers' rows and the group's columns in their new order."""
    import torch

    changed = {}
    for site in producers:
        rows = torch.cat([order, torch.arange(len(order), site.out_features)])
        changed[site.weight] = from_matrix(site, as_matrix(site, tensors[site.weight])[rows].contiguous())
        if site.bias:
            changed[site.bias] = tensors[site.bias][rows]
    for site in group.sites:
        changed[site.weight] = from_matrix(site, as_matrix(site, tensors[site.weight])[:, channels].contiguous())
    return changed


def permuted_stats(stats: InputStats, channels: torch.Tensor) -> InputStats:
    """Statistics of x' = x[channels]. What names channels by number is not kept."""
    changed: dict[str, Any] = {
        name: value[..., channels] for name, value in stats.tensors().items() if name in BY_CHANNEL
    }
    if stats.hessian is not None:
        changed["hessian"] = stats.hessian[channels][:, channels]
    if stats.log2_histogram is not None:
        changed["log2_histogram"] = stats.log2_histogram[channels]
    return replace(stats, **changed, top_tokens=None)
