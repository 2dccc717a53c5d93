"""Scale search: for every (row, group) the grid with the least output error, not the least weight error.

Inside one group the output error of a rounding error d is d^T H_gg d, with H_gg the group's diagonal block of the
hessian (methods sheet, section 0.3: equal to the sampled form). Clipping thresholds are a special case: a smaller
scale clips. Without a hessian the block is the identity and the search minimises the weight error.
"""

from __future__ import annotations

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.errors import diagonal_blocks
from outlierq.ops.grid import Grid, in_groups, minmax_grid, range_grid, stored


def group_error(change: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
    """d^T H_gg d for every (row, group). change: [out, groups, columns]; blocks: [groups, columns, columns]."""
    if blocks is None:
        return change.square().sum(-1)
    by_group = change.transpose(0, 1)
    return ((by_group @ blocks) * by_group).sum(-1).T


def search_grid(
    w: torch.Tensor, scheme: QuantScheme, hessian: torch.Tensor | None, *, candidates: int = 20, shrink: float = 0.6
) -> Grid:
    """The best of `candidates` grids per (row, group), then refitted to its own codes.

    w: [out, in] float32. hessian: [in, in] or None. Candidate ranges run from 1 down to `shrink` of the full range.
    """
    grouped = in_groups(w, scheme)
    blocks = None if hessian is None else diagonal_blocks(hessian, grouped.shape[-1])
    best = minmax_grid(w, scheme)
    least = group_error(best.round(grouped) - grouped, blocks)
    for grid in _candidates(grouped, scheme, candidates, shrink):
        best, least = _keep_better(best, least, grid, grouped, blocks)
    for _ in range(2):
        best, least = _keep_better(best, least, _refit(best, grouped, blocks), grouped, blocks)
    return best


def _candidates(grouped: torch.Tensor, scheme: QuantScheme, count: int, shrink: float):
    """Grids over shrunken ranges. Symmetric ones use the full code range, with either sign of the scale:
    the extreme weight then sits on the code -2^(bits-1) (full-range symmetric, methods sheet 0.2)."""
    factors = [1 - (1 - shrink) * i / (count - 1) for i in range(count)]
    if scheme.symmetric:
        largest = grouped.abs().amax(-1)
        sign = torch.where(grouped.amax(-1) >= -grouped.amin(-1), -1.0, 1.0)
        for factor in factors:
            yield Grid(stored(sign * largest * factor / -scheme.code_min, scheme), None, scheme)
        return
    low, high = grouped.amin(-1), grouped.amax(-1)
    for factor in factors:
        yield range_grid(low * factor, high * factor, scheme)


def _refit(grid: Grid, grouped: torch.Tensor, blocks: torch.Tensor | None) -> Grid:
    """The scale that fits the present codes best: (c^T H w) / (c^T H c) per group, least squares in closed form."""
    codes = grid.encode(grouped)
    if grid.zero_point is not None:
        codes = codes - grid.zero_point[..., None]
    weighted = codes if blocks is None else (codes.transpose(0, 1) @ blocks).transpose(0, 1)
    power = (weighted * codes).sum(-1)
    scale = (weighted * grouped).sum(-1) / torch.where(power > 0, power, torch.ones_like(power))
    scale = torch.where(power > 0, scale, grid.scale)
    return Grid(stored(scale, grid.scheme), grid.zero_point, grid.scheme)


def _keep_better(best: Grid, least: torch.Tensor, grid: Grid, grouped: torch.Tensor, blocks: torch.Tensor | None):
    """Take `grid` at the places where it errs less than `best`."""
    error = group_error(grid.round(grouped) - grouped, blocks)
    better = error < least
    return best.where(better, grid), torch.where(better, error, least)
