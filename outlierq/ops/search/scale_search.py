"""Scale search: for every (row, group) the grid with the least output error, not the least weight error.

Inside one group the output error of a rounding error d is d^T H_gg d, with H_gg the group's diagonal block of the
hessian (equal to the sampled form). Clipping thresholds are a special case: a smaller
scale clips. Without a hessian the block is the identity and the search minimises the weight error.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from outlierq.core.notes import note
from outlierq.core.scheme import QuantScheme
from outlierq.ops.compiled import solving as native
from outlierq.ops.errors import diagonal_blocks
from outlierq.ops.grid import Grid, in_groups, minmax_grid, over_blocks, range_grid
from outlierq.ops.outlier_victim import curvatures
from outlierq.ops.precision import LEAST_WIDTH, takes_bfloat16
from outlierq.ops.search.columns import ColumnGrid
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
# Rows searched at a time by compiled code, which keeps 16 of them in the cache.
PIECE_ROWS = 512
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
    search = _Search(_Groups(grouped, scheme, diagonal), minmax_grid(w, scheme))
    for share in COARSE:
        better = search.try_share(torch.full_like(search.low, share), torch.full_like(search.low, share))
        if share < 1 and better.float().mean() < SELDOM:
            break
    return search.best


def improved(w: torch.Tensor, start: Grid, blocks: torch.Tensor | None) -> Grid:
    """The same from a grid to start with. blocks: those of `group_blocks`, or None."""
    if fits_levels(start.scheme):
        return search_types(w, in_groups(w, start.scheme), start.scheme, blocks)
    if blocks is not None and _is_compiled(w, start.scheme, blocks):
        pieces = [slice(first, first + PIECE_ROWS) for first in range(0, len(w), PIECE_ROWS)]
        parts = [_search(_InLanes(w[piece], start.scheme, blocks), rows_of(start, piece)) for piece in pieces]
    else:
        parts = _improved_by_torch(w, start, blocks)
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    zero_point = torch.cat(zero_points) if zero_points else None
    return replace(start, scale=torch.cat([part.scale for part in parts]), zero_point=zero_point)


def _improved_by_torch(w: torch.Tensor, start: Grid, blocks: torch.Tensor | None) -> list[Grid]:
    """The grids of some rows at a time."""
    grouped, scheme = in_groups(w, start.scheme), start.scheme
    together = 1 if scheme.block is None else scheme.block[0]
    rows = max(1, PIECE_WEIGHTS // w.shape[1] // together) * together
    short = blocks is not None and takes_bfloat16(w.shape[1], w.device)
    if blocks is not None and short:
        blocks = blocks.bfloat16()  # candidates are compared: a part in a thousand of an error does not matter
    pieces = [slice(first, first + rows) for first in range(0, len(w), rows)]
    return [
        _search(_Groups(_by_group(grouped[piece]) if short else grouped[piece], scheme, blocks), rows_of(start, piece))
        for piece in pieces
    ]


def _is_compiled(w: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor) -> bool:
    """Whether compiled code searches: on the CPU, where it gives what torch gives on a small case.

    Of wide weights only, where the order of sums is the processor's anyway (ops/precision.py).
    """
    if w.device.type != "cpu" or w.shape[1] < LEAST_WIDTH or not native.sums_up(scheme, blocks.shape[-1]):
        return False
    if not _agrees():
        note("the compiled scale search does not give what torch gives: torch searches instead, slower")
    return _agrees()


@cache
def _agrees() -> bool:
    """Whether compiled sums over groups are those of torch but for rounding, tried once: 21 rows, 3 groups of 8."""
    random, scheme = torch.Generator().manual_seed(0), QuantScheme(4, 8, symmetric=False)
    w, root = torch.randn(21, 24, generator=random), torch.randn(3, 8, 12, generator=random)
    blocks, grid = root @ root.transpose(1, 2), minmax_grid(w, scheme)
    one, other = _Groups(in_groups(w, scheme), scheme, blocks), _InLanes(w, scheme, blocks)
    pairs = zip((one.errors(grid), *one.fits(grid)), (other.errors(grid), *other.fits(grid)), strict=True)
    return all(torch.allclose(found, expected, rtol=1e-3, atol=1e-3) for expected, found in pairs)


def _by_group(grouped: torch.Tensor) -> torch.Tensor:
    """A copy [out, groups, columns] in which the rows of a group lie together, as their products take them."""
    return grouped.transpose(0, 1).contiguous().transpose(0, 1)


class _Groups:
    """Some rows [out, groups, columns], and what errors in each group count (`group_error`)."""

    def __init__(self, grouped: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor | None):
        self.grouped, self.scheme, self.blocks = grouped, scheme, blocks
        self.curvature = curvatures(blocks, scheme)

    def errors(self, grid: Grid) -> torch.Tensor:
        """[out, groups] error of the whole block, or of the row's group, that shares a scale."""
        error = group_error(grid.round(self.grouped, self.curvature).sub_(self.grouped), self.blocks)
        return over_blocks(error, self.scheme, "sum")

    def fits(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """c^T H c and c^T H w of each group, [out, groups], c being its codes less the zero point."""
        codes = grid.encode(self.grouped, self.curvature)
        if grid.zero_point is not None:
            codes = codes - grid.zero_point[..., None]
        weighted = codes if self.blocks is None else _times(codes.transpose(0, 1), self.blocks).transpose(0, 1)
        power = over_blocks((weighted * codes).sum(-1), self.scheme, "sum")
        return power, over_blocks((weighted * self.grouped).sum(-1), self.scheme, "sum")


class _InLanes(_Groups):
    """The same for compiled code; its sums are float32, and of another order."""

    def __init__(self, w: torch.Tensor, scheme: QuantScheme, blocks: torch.Tensor):
        super().__init__(in_groups(w, scheme), scheme, blocks)
        self.width, self.columns, self.known = w.shape[1], native.in_lanes(self.grouped), blocks

    def errors(self, grid: Grid) -> torch.Tensor:
        return native.group_errors(ColumnGrid.of(grid, self.width), self.columns, self.known).T.contiguous()

    def fits(self, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        power, product = native.group_fits(ColumnGrid.of(grid, self.width), self.columns, self.known)
        return power.T.contiguous(), product.T.contiguous()


def _search(weights: _Groups, start: Grid) -> Grid:
    """The best grid of some rows."""
    search, scheme = _Search(weights, start), weights.scheme
    for share in PAIRS if scheme.kind == "outlier-victim" else COARSE:
        search.try_share(torch.full_like(search.low, share), torch.full_like(search.low, share))
    for step in FINE:
        for low, high in BOTH_ENDS if scheme.symmetric else EACH_END:
            search.try_share(search.low_share + step * low, search.high_share + step * high)
    for _ in range(2):
        search.try_grid(_refit(search.best, weights))
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

    def __init__(self, weights: _Groups, start: Grid):
        self.weights, self.scheme, self.best, self.start = weights, weights.scheme, start, start.scale
        self.low = -over_blocks(-weights.grouped.amin(-1), self.scheme, "amax")
        self.high = over_blocks(weights.grouped.amax(-1), self.scheme, "amax")
        self.least = weights.errors(start)
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
        error = self.weights.errors(grid)
        better = error < self.least
        self.best, self.least = self.best.where(better, grid), torch.where(better, error, self.least)
        return better


def _refit(grid: Grid, weights: _Groups) -> Grid:
    """The scale that fits the present codes best: (c^T H w) / (c^T H c) per group, least squares in closed form."""
    power, fitted = weights.fits(grid)
    scale = fitted / torch.where(power > 0, power, torch.ones_like(power))
    scale = torch.where(power > 0, scale, grid.scale)
    return grid.with_scale(scale)
