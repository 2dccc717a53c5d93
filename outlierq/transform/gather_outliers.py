"""Permutations that bring the outlier columns of a static int8 split to the end, at no cost when the model runs.

Rows of whatever writes a linear's input can be written in another order when the linear's columns follow: exact, and
nothing is left to do at run time (the split of arXiv:2208.07339 needs a gather otherwise). Between up and down
projection any order will do; the values of an attention head must stay inside of it, and query heads that share a
key-value head share the order. The inputs of norms are left alone: one order would have to serve the whole residual
stream, all blocks and the embeddings, while the outlier channels differ from norm to norm.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt

from outlierq.core.stats import InputStats
from outlierq.ops.twins.int8_split import THRESHOLD, choose_columns
from outlierq.registry import permuter


@permuter("gather_outliers", needs=("min", "max", "sum_sq", "rows"), paper="arXiv:2208.07339")
def gather_outliers(
    stats: InputStats,
    *,
    threshold: Annotated[float, Gt(0)] = THRESHOLD,
    ratio: Annotated[float, Gt(1)] = 20.0,
    min_rate: Annotated[float, Ge(0)] = 0.001,
) -> torch.Tensor:
    """[k] the input channels that shall come last: those that `int8_split` keeps in 16 bits with the same options.

    threshold: of an outlier, in the units of the input. ratio: of an outlier to the median channel. min_rate: share of
    the tokens in which it must be one.
    """
    return choose_columns(stats, threshold=threshold, ratio=ratio, min_rate=min_rate)[0]


def last_in_runs(columns: torch.Tensor, index: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Orders of input channels and of producer rows that move `columns` to the end of each run of `width` channels.

    index: [in] producer row of each input channel. Returns ([in], [rows]): new channel j is the old channel at j, and
    likewise for rows (those that feed no channel stay). A row goes last when any channel that it feeds shall. None when
    runs of this width do not correspond to runs of rows.
    """
    if len(index) % width:
        return None
    first = index[::width]
    places = torch.arange(width)
    if not torch.equal(index.view(-1, width), first[:, None] + places):
        return None
    late = torch.zeros(int(index.max()) + 1, dtype=torch.bool)
    late[index[columns]] = True
    rows = torch.arange(len(late))
    channels = torch.arange(len(index))
    for run, start in enumerate(first.tolist()):
        inside = torch.argsort(late[start : start + width].int(), stable=True)
        rows[start : start + width] = start + inside
        channels[run * width : (run + 1) * width] = run * width + inside
    return channels, rows
