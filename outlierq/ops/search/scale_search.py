"""Scale search: for every (row, group) the grid with the least output error, not the least weight error.

Inside one group the output error of a rounding error d is d^T H_gg d, with H_gg the group's diagonal block of the
hessian (equal to the sampled form). Clipping thresholds are a special case: a smaller
scale clips. Without a hessian the block is the identity and the search minimises the weight error.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.errors import diagonal_blocks
from outlierq.ops.grid import Grid, in_groups, minmax_grid, over_blocks, range_grid
from outlierq.ops.outlier_victim import curvatures
from outlierq.ops.precision import takes_bfloat16
from outlierq.ops.search.level_fit import fits_levels
from outlierq.ops.search.type_search import search_types

# Shares of the range: first these, then steps from the best one. Groups with one useless extreme need the small shares.
COARSE = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.45, 0.3)
FINE = (0.04, 0.02)
# Of outlier-victim pairs, of the scale with which outliers begin at three standard deviations: the range of OliVe's
# own search, and below it, where hessians ask for small errors of most weights.
PAIRS = (0.45, 0.6, 0.75, 0.9, 1.05, 1.2, 1.4, 1.6, 1.85, 2.15, 2.5)
# Of the groups: where fewer err less over a smaller share, a quick search ends.
SELDOM = 0.05
# Weights searched at a time: 1 MiB in float32. What a step makes then stays in the cache; a large weight as a whole
# takes two to three times the time. Rows do not depend on each other, those of a block aside.
PIECE_WEIGHTS = 1 << 18
BOTH_ENDS = ((1, 1), (-1, -1))
EACH_END = ((-1, 0), (0, -1), (1, 0), (0, 1))


def group_error(change: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    """d^T H_gg d for every (row, group). change: [out, groups, columns]; blocks: [groups, columns, columns], in float32
    or bfloat16, or [groups, columns] where they are diagonal.
    """
    if blocks is None:
        return change.square().sum(-1)
    by_group = change.transpose(0, 1)
    return _times(by_group, blocks).mul_(by_group).sum(-1).T


def _times(by_group: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Every group [groups, out, columns] times its block, or its diagonal one, in float32."""
    given = by_group.to(blocks.dtype)
    return (given @ blocks if blocks.dim() == 3 else given * blocks[:, None]).float()


def search_grid(w: torch.Tensor, scheme: QuantScheme, hessian: torch.Tensor | None) -> Grid:
    """The best grid found per (row, group): never worse than the min-max grid in group error.

    w: [out, in] float32. hessian: [in, in], [in] for its diagonal, or None. Shares of the group's range are tried
    coarsely, then around the best one (for asymmetric grids each end on its own); the scale is then fitted to its own
    codes.
    """
    return improved(w, minmax_grid(w, scheme), None if hessian is None else group_blocks(hessian, scheme))


def quick_grid(w: torch.Tensor, scheme: QuantScheme, importance: torch.Tensor) -> Grid:
    """A grid about as good as that of `search_grid`, for a tenth of the time: shares fall as long as they help many.

    w: [out, in] float32. importance: [in], what a squared error of each column counts.
    """
    grouped, diagonal = in_groups(w, scheme), group_blocks(importance, scheme)
    if fits_levels(scheme):
        return search_types(w, grouped, scheme, diagonal)
    search = _Search(grouped, scheme, diagonal, minmax_grid(w, scheme))
    for share in COARSE:
        better = search.try_share(torch.full_like(search.low, share), torch.full_like(search.low, share))
        if share < 1 and better.float().mean() < SELDOM:
            break
    return search.best


def improved(w: torch.Tensor, start: Grid, blocks: torch.Tensor | None) -> Grid:
    """The same from a grid to start with. blocks: those of `group_blocks`, or None."""
    grouped, scheme = in_groups(w, start.scheme), start.scheme
    if fits_levels(scheme):
        return search_types(w, grouped, scheme, blocks)
    together = 1 if scheme.block is None else scheme.block[0]
    rows = max(1, PIECE_WEIGHTS // w.shape[1] // together) * together
    short = blocks is not None and takes_bfloat16(w.shape[1], w.device)
    if blocks is not None and short:
        blocks = blocks.bfloat16()  # candidates are compared: a part in a thousand of an error does not matter
    pieces = [slice(first, first + rows) for first in range(0, len(w), rows)]
    parts = [
        _search(_by_group(grouped[piece]) if short else grouped[piece], scheme, blocks, rows_of(start, piece))
        for piece in pieces
    ]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    zero_point = torch.cat(zero_points) if zero_points else None
    return replace(start, scale=torch.cat([part.scale for part in parts]), zero_point=zero_point)


def _by_group(grouped: torch.Tensor) -> torch.Tensor:
    """A copy [out, groups, columns] in which the rows of a group lie together, as their products take them."""
    return grouped.transpose(0, 1).contiguous().transpose(0, 1)


def _search(grouped: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None, start: Grid) -> Grid:
    """The best grid of some rows [out, groups, columns]."""
    search = _Search(grouped, scheme, blocks, start)
    for share in PAIRS if scheme.kind == "outlier-victim" else COARSE:
        search.try_share(torch.full_like(search.low, share), torch.full_like(search.low, share))
    for step in FINE:
        for low, high in BOTH_ENDS if scheme.symmetric else EACH_END:
            search.try_share(search.low_share + step * low, search.high_share + step * high)
    for _ in range(2):
        search.try_grid(_refit(search.best, grouped, blocks, search.curvature))
    return search.best


def rows_of(grid: Grid, part: slice) -> Grid:
    """Some rows of a grid; units that are of the whole weight stay."""
    zero_point = None if grid.zero_point is None else grid.zero_point[part]
    units = grid.units if grid.units is None or grid.units.dim() == 1 else grid.units[part]
    return replace(grid, scale=grid.scale[part], zero_point=zero_point, units=units)


def group_blocks(hessian: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The diagonal blocks [groups, columns, columns] of a hessian [in, in]; the last group may be filled up.

    Of a diagonal [in] alone, [groups, columns].
    """
    groups, columns = scheme.groups(len(hessian)), scheme.columns_per_group(len(hessian))
    missing = groups * columns - hessian.shape[0]
    if hessian.dim() == 1:
        return torch.nn.functional.pad(hessian, (0, missing)).view(groups, columns)
    if missing:
        hessian = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
    return diagonal_blocks(hessian, columns)


class _Search:
    """The best grid so far, its error, and the shares of the range it came from; all [out, groups]."""

    def __init__(self, grouped: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None, start: Grid):
        self.grouped, self.scheme, self.blocks, self.best = grouped, scheme, blocks, start
        self.start, self.curvature = start.scale, curvatures(blocks, scheme)
        self.low = -over_blocks(-grouped.amin(-1), scheme, "amax")
        self.high = over_blocks(grouped.amax(-1), scheme, "amax")
        self.least = self._error(start)
        self.low_share = torch.ones_like(self.low)
        self.high_share = torch.ones_like(self.low)

    def try_share(self, low_share: torch.Tensor, high_share: torch.Tensor) -> torch.Tensor:
        """Take the grid over these shares of the range where it errs less; returns those places.

        A symmetric grid of integers uses the full code range, with either sign of the scale: the extreme weight then
        sits on the code -2^(bits-1) (full-range symmetric). Floats have as many negative values as positive ones.
        """
        if self.scheme.kind == "outlier-victim":
            grid = self.best.with_scale(self.start * high_share)
        elif self.scheme.kind == "float":
            largest = self.high.maximum(-self.low)
            grid = self.best.with_scale(largest * high_share / self.scheme.code_max)
        elif self.scheme.symmetric:
            extreme = torch.where(self.high >= -self.low, self.high, self.low)
            grid = self.best.with_scale(extreme * high_share / self.scheme.code_min)
        else:
            grid = range_grid(self.low * low_share, self.high * high_share, self.scheme, self.best.units)
        better = self.try_grid(grid)
        self.low_share = torch.where(better, low_share, self.low_share)
        self.high_share = torch.where(better, high_share, self.high_share)
        return better

    def try_grid(self, grid: Grid) -> torch.Tensor:
        """Take `grid` where it errs less; returns those places."""
        error = self._error(grid)
        better = error < self.least
        self.best, self.least = self.best.where(better, grid), torch.where(better, error, self.least)
        return better

    def _error(self, grid: Grid) -> torch.Tensor:
        """[out, groups] error of the whole block, or of the row's group, that shares a scale."""
        error = group_error(grid.round(self.grouped, self.curvature).sub_(self.grouped), self.blocks)
        return over_blocks(error, self.scheme, "sum")


def _refit(
    grid: Grid, grouped: torch.Tensor, blocks: torch.Tensor | None, curvature: torch.Tensor | None = None
) -> Grid:
    """The scale that fits the present codes best: (c^T H w) / (c^T H c) per group, least squares in closed form.

    grouped, blocks: as in `group_error`. curvature: as in `Grid.encode`.
    """
    codes = grid.encode(grouped, curvature)
    if grid.zero_point is not None:
        codes = codes - grid.zero_point[..., None]
    weighted = codes if blocks is None else _times(codes.transpose(0, 1), blocks).transpose(0, 1)
    power = over_blocks((weighted * codes).sum(-1), grid.scheme, "sum")
    fitted = over_blocks((weighted * grouped).sum(-1), grid.scheme, "sum")
    scale = fitted / torch.where(power > 0, power, torch.ones_like(power))
    scale = torch.where(power > 0, scale, grid.scale)
    return grid.with_scale(scale)
