"""Orders of channels that no report tells of: columns, or the rows that feed them, matched with those of the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.move import runs
from outlierq.pipeline.checking.weights import relative_error
from outlierq.transform.gather_outliers import last_in_runs

if TYPE_CHECKING:
    import torch

# Relative error of a weight that lies in its own order; channels that must be where the order has them.
IN_ORDER, LEAST_AGREEING = 0.3, 0.9
# Random directions in which channels are compared: two channels of one length are as alike as 1 / sqrt(64) by chance.
DIRECTIONS = 64


def inferred_orders(
    now: Mapping[str, torch.Tensor],
    then: Mapping[str, torch.Tensor],
    consumers: list[str],
    heads: list[tuple[int, int]],
) -> Iterator[dict[str, Any]]:
    """Traces of kind "order", without biases. now, then: weights [out, in] of a block. consumers: those that keep
    outlier columns. heads: possible (attention heads, key-value heads).
    """
    from outlierq.calibrate.folds import index_maps

    used: set[str] = set()
    for by_rows in (False, True):  # what columns tell first: a row may be out of its order for another linear's sake
        for consumer in [name for name in consumers if relative_error(now[name], then[name]) > IN_ORDER]:
            candidates = (
                (producer, index)
                for producer in now
                if producer != consumer and not {producer, consumer} & used
                for index in index_maps(len(now[producer]), now[consumer].shape[1], heads)
            )
            found = (_trace(now, then, *pair, consumer, heads, by_rows=by_rows) for pair in candidates)
            trace = next(filter(None, found), None)
            if trace is not None:
                used |= {name for side in ("producers", "sites") for name, _, _ in trace[side]}
                yield trace


def _trace(
    now: Mapping[str, torch.Tensor],
    then: Mapping[str, torch.Tensor],
    producer: str,
    index: tuple[int, ...],
    consumer: str,
    heads: list[tuple[int, int]],
    *,
    by_rows: bool,
) -> dict[str, Any] | None:
    """The trace of an order between two linears; None where there is none."""
    import torch

    order = _order(now, then, producer, consumer, torch.tensor(index), heads, by_rows=by_rows)
    if order is None:
        return None
    columns, width, rows = order
    producers = [name for name in now if name != consumer and _is_ordered(now[name], then[name], rows)]
    return None if not producers else {
        "kind": "order",
        "producers": [[name, None, False] for name in producers],
        "sites": [[consumer, None, False]],
        "index": runs(list(index)),
        "columns": columns,
        "width": width,
    }  # fmt: skip


def _order(
    now: Mapping[str, torch.Tensor],
    then: Mapping[str, torch.Tensor],
    producer: str,
    consumer: str,
    index: torch.Tensor,
    heads: list[tuple[int, int]],
    *,
    by_rows: bool,
) -> tuple[list[int], int, torch.Tensor] | None:
    """Columns that went last, the width of a run, and the order of the producer's rows; None where none fits."""
    import torch

    identity = torch.equal(index, torch.arange(len(index)))
    width = len(index) if identity or not heads else len(index) // heads[0][0]
    if by_rows:
        rows = _late(now[producer], then[producer], width)
        columns = None if rows is None else torch.isin(index, torch.tensor(rows)).nonzero().flatten().tolist()
    else:
        columns = _late(now[consumer].T, then[consumer].T, width)
    orders = last_in_runs(torch.tensor(columns, dtype=torch.long), index, width) if columns else None
    if orders is None:
        return None
    channels, order = orders
    order = torch.cat([order, torch.arange(len(order), len(now[producer]))])
    judged = (now[producer], then[producer], order) if by_rows else (now[consumer].T, then[consumer].T, channels)
    return (columns or [], width, order) if _is_ordered(*judged) else None


def _is_ordered(now: torch.Tensor, then: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether an order of rows brings a weight to its source."""
    if len(now) != len(rows):
        return False
    return relative_error(now, then[rows]) < min(IN_ORDER, relative_error(now, then) / 2)


def _late(now: torch.Tensor, then: torch.Tensor, width: int) -> list[int] | None:
    """Rows of `then` that come last in runs of `width` rows of `now`; None where the others do not keep their order."""
    if len(now) % width:
        return None
    places = _places(now, then)
    late = []
    for start in range(0, len(now), width):
        run = places[start : start + width] - start
        breaks = [0, *((run[1:] < run[:-1]).nonzero().flatten() + 1).tolist()]
        best = max(breaks, key=lambda cut: _agreement(run, cut))
        if _agreement(run, best) < LEAST_AGREEING:
            return None
        late += (run[best:] + start).tolist() if best else []
    return late


def _agreement(run: torch.Tensor, cut: int) -> float:
    """Part of a run that is where it belongs when those from `cut` on went last."""
    import torch

    last = torch.zeros(len(run), dtype=torch.bool)
    last[run[cut:].clamp(0, len(run) - 1)] = cut > 0
    return float((torch.argsort(last.int(), stable=True) == run).float().mean())


def _places(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """For each row of `now` the row of `then` that is most like it."""
    import torch

    directions = torch.randn(now.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    one, other = (part @ directions for part in (now, then))
    one, other = (part / part.norm(dim=1, keepdim=True).clamp(min=1e-30) for part in (one, other))
    places: torch.Tensor = (one @ other.T).argmax(1)
    return places
