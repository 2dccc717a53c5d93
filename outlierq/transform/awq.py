"""AWQ: scale up the input channels that matter before rounding. Lin et al. 2023, arXiv:2306.00978."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from outlierq.core.notes import note
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import from_groups, in_groups
from outlierq.ops.held_out import without_rows
from outlierq.ops.precision import matmul_operands
from outlierq.ops.search.scale_search import search_grid
from outlierq.ops.search.site_error import judging_grid
from outlierq.ops.search.sweep import compensated
from outlierq.registry import transform

# Scales outside this range push outliers into the weights and into the 16-bit norm (methods sheet 1.e).
LARGEST_SCALE = 100.0
# Rows on which the winner must also beat no scaling when every group's scale is searched.
CONFIRMING_ROWS = 256
Candidate = tuple[float, torch.Tensor, str, float]  # output error, scale [in], kind and r of the family


@transform("awq", needs=("hessian", "abs_mean"), paper="arXiv:2306.00978")
def awq(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None = None,
    *,
    grid_points: Annotated[int, Ge(1)] = 10,
    scaling: Literal["plain", "duo", "both"] = "both",
    search_rows: Annotated[int, Ge(1)] = 1024,
) -> torch.Tensor:
    """Scale [in] that minimises the output error tr(D H D^T) of rounding `w * scale` and dividing it out again.

    Candidates: s = x^r ("plain", Eq. 5) and s = x^r / m^(1-r) ("duo": m is the mean weight magnitude relative to its
    group's maximum), x the mean |input| of a channel, r on a grid of [0, 1] and then around the best point; always the
    identity, so the result errs no more than no scaling. grid_points: steps of r on [0, 1]. scaling: which families to
    try. search_rows: at most so many rows of w, evenly spread, judge the candidates. w: [out, in] float32, all linears
    that read the input, stacked.
    tie: [in] producer channel of every input channel, or None; channels with one producer get one scale (grouped-query
    attention repeats a value channel over query heads).
    """
    if len(w) > search_rows:
        w = w[torch.linspace(0, len(w) - 1, search_rows, device=w.device).long()]
    family = Family(w, stats.need("abs_mean"), scheme, tie)
    judge = Judge(w, stats.need("hessian"), scheme)
    best = (judge.error(torch.ones_like(family.activity)), torch.ones_like(family.activity), "", 0.0)
    kinds = ("plain", "duo") if scaling == "both" else (scaling,)
    step = 1 / grid_points
    for kind in kinds:
        for i in range(grid_points + 1):
            best = _better(best, judge, family, kind, i * step)
    if best[2]:
        _, _, kind, middle = best
        for r in (middle - step / 2, middle + step / 2):
            best = _better(best, judge, family, kind, r)
        if judge.searched_error(best[1]) >= judge.searched_error(torch.ones_like(best[1])):
            return torch.ones_like(best[1])
    return best[1]


@transform("awq_held_out", needs=("hessian", "abs_mean", "rows"), paper="arXiv:2306.00978")
def awq_held_out(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None = None,
    *,
    grid_points: Annotated[int, Ge(1)] = 10,
    scaling: Literal["plain", "duo", "both"] = "both",
    search_rows: Annotated[int, Ge(1)] = 1024,
) -> torch.Tensor:
    """The scale [in] of awq, found without the kept tokens, where GPTQ errs less after it on these than without it.

    For what GPTQ rounds: awq itself judges by rounding to nearest, on the tokens that it searches on. w: [out, in].
    """
    rest, kept = without_rows(stats)
    searched = replace(stats, hessian=rest)
    scale = awq(w, searched, scheme, tie, grid_points=grid_points, scaling=scaling, search_rows=search_rows)
    judge, none = Judge(w, rest, scheme), torch.ones_like(scale)
    if torch.equal(scale, none) or judge.held_out_error(scale, kept) < judge.held_out_error(none, kept):
        return scale
    note("no scaling: it errs less on tokens held out")
    return none


def _better(best: Candidate, judge: Judge, family: Family, kind: str, r: float) -> Candidate:
    """`best` (error, scale, kind, r), or the candidate when it errs less."""
    scale = family.scale(kind, r)
    error = judge.error(scale)
    return (error, scale, kind, r) if error < best[0] else best


class Judge:
    """Output error of rounding w [out, in] after a scale [in]. Ranking candidates needs bfloat16 operands only."""

    def __init__(self, w: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme):
        self.w, self.hessian, self.scheme = w, hessian, scheme

    def error(self, scale: torch.Tensor) -> float:
        """tr(D H D^T) of the rounding error D of `w * scale`, divided by the scale [in] again."""
        scaled = self.w * scale
        rounded = judging_grid(scaled, self.scheme).round(in_groups(scaled, self.scheme)).view_as(scaled)
        change = rounded.sub_(scaled).div_(scale)
        with matmul_operands(torch.bfloat16):
            return (change @ self.hessian).mul_(change).sum().item()

    def searched_error(self, scale: torch.Tensor) -> float:
        """The same with the full scale search, which few-bit grids profit from most; on a part of the rows."""
        scaled = self.w[:: max(1, len(self.w) // CONFIRMING_ROWS)] * scale
        grid = search_grid(scaled, self.scheme, self.hessian / (scale[:, None] * scale))
        change = grid.round(in_groups(scaled, self.scheme)).view_as(scaled).sub_(scaled).div_(scale)
        return (change @ self.hessian).mul_(change).sum().item()

    def held_out_error(self, scale: torch.Tensor, kept: torch.Tensor) -> float:
        """The error on kept tokens [n, in] when GPTQ rounds after the scale, without them; on a part of the rows."""
        scaled = self.w[:: max(1, len(self.w) // CONFIRMING_ROWS)] * scale
        hessian = self.hessian / (scale[:, None] * scale)
        grid = search_grid(scaled, self.scheme, hessian)
        codes = compensated(scaled, grid, hessian)
        change = from_groups(grid.decode(in_groups(codes, self.scheme)), scaled.shape[1]).sub_(scaled).div_(scale)
        return (kept @ change.T).square().sum().item()


class Family:
    """The candidate scales of one input group."""

    def __init__(self, w: torch.Tensor, abs_mean: torch.Tensor, scheme: QuantScheme, tie: torch.Tensor | None):
        grouped = in_groups(w, scheme).abs()
        magnitude = (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).reshape(w.shape).mean(0)
        activity = _tied(abs_mean, tie)
        self.alive = activity > 1e-6 * activity.median()
        self.activity, self.magnitude = activity.clamp(min=1e-8), _tied(magnitude, tie)

    def scale(self, kind: str, r: float) -> torch.Tensor:
        """[in]: geometric middle 1, dead channels 1, all within [1/100, 100]."""
        scale = self.activity**r
        if kind == "duo":
            scale = scale / (self.magnitude ** (1 - r) + 1e-4)
        living = scale[self.alive]
        if living.numel() == 0:
            return torch.ones_like(scale)
        scale = scale / (living.max() * living.min()).sqrt()
        scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
        return torch.where(self.alive, scale, torch.ones_like(scale))


def _tied(values: torch.Tensor, tie: torch.Tensor | None) -> torch.Tensor:
    """Mean of `values` [in] over the channels that share a producer channel."""
    if tie is None:
        return values
    size = int(tie.max()) + 1
    total = torch.zeros(size, device=values.device).index_add_(0, tie, values)
    count = torch.zeros(size, device=values.device).index_add_(0, tie, torch.ones_like(values))
    return (total / count.clamp(min=1))[tie]
