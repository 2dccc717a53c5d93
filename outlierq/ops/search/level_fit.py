"""Refitting what a type of GGUF stores beside the codes: every scale, minimum and unit in its turn, on its own grid.

For given codes the output error of a row is a quadratic in the row's scales and minima. Each of them is moved to the
best value that can be stored, given all others, then the units of a block with all that counts in them. No step can
raise the error, since what is stored now is a candidate of every step. (Solving for all at once and rounding gains
nothing where scales have few bits.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.grid import SMALLEST_FLOAT16, Grid, in_groups, joined, small_scale

# Elements of what a part of the rows is worked on with, in float32.
ELEMENTS = 1 << 23
ROUNDS = 2


@dataclass
class _Part:
    """Some rows [r]. values: [r, n] the scales of all groups, then their minima; gram: [r, n, n] and residual: [r, n]
    the products of what they are multiplied with, under the hessian, with each other and with what is left to explain.
    """

    values: torch.Tensor
    gram: torch.Tensor
    residual: torch.Tensor

    def move(self, places: list[int], step: torch.Tensor) -> None:
        """Add `step` [r, places] to some values."""
        self.values[:, places] += step
        self.residual -= torch.einsum("rnp,rp->rn", self.gram[:, :, places], step)

    def best_step(self, places: list[int], direction: torch.Tensor) -> torch.Tensor:
        """[r] how far to go along `direction` [r, places] for the least error; 0 where it changes nothing."""
        slope = (self.residual[:, places] * direction).sum(1)
        bend = torch.einsum("rpq,rp,rq->r", self.gram[:, places][:, :, places], direction, direction)
        return torch.where(bend > 0, slope / bend, 0.0)


def fits_levels(scheme: QuantScheme) -> bool:
    """Whether it is a type of GGUF of which scales are refitted here."""
    return scheme.type is not None and scheme.kind != "float"


def refit_levels(w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> Grid:
    """The grid with better scales, minima and units for these codes. w, codes: [out, in]. hessian: [in, in]."""
    grouped = in_groups(codes, grid.scheme)
    groups, columns = grouped.shape[1:]
    count = groups * (1 if grid.zero_point is None else 2)
    rows = max(1, ELEMENTS // (count * max(count, hessian.shape[0])))
    parts = [
        _refitted(w[part], grouped[part], _rows(grid, part), hessian.view(groups, columns, -1))
        for part in (slice(start, start + rows) for start in range(0, len(w), rows))
    ]
    return joined(parts)


def _rows(grid: Grid, part: slice) -> Grid:
    """Some rows of a grid."""
    zero_point, units = grid.zero_point, grid.units
    return replace(
        grid,
        scale=grid.scale[part],
        zero_point=None if zero_point is None else zero_point[part],
        units=None if units is None else units[part],
    )


def _refitted(w: torch.Tensor, grouped: torch.Tensor, grid: Grid, by_group: torch.Tensor) -> Grid:
    """`refit_levels` of some rows. by_group: the hessian [groups, columns, in]."""
    part = _part(w, grouped, grid, by_group)
    units = grid.units
    for _ in range(ROUNDS):
        _move_each(part, grid, units)
        units = _move_units(part, grid, units)
    groups = grouped.shape[1]
    scale = part.values[:, :groups].contiguous()
    zero_point = None if grid.zero_point is None else part.values[:, groups:] / scale
    return replace(grid, scale=scale, zero_point=zero_point, units=units)


def _part(w: torch.Tensor, grouped: torch.Tensor, grid: Grid, by_group: torch.Tensor) -> _Part:
    """The products for some rows: a weight is scale * code - minimum."""
    rows, groups, columns = grouped.shape
    bases = [grouped] if grid.zero_point is None else [grouped, -torch.ones_like(grouped)]
    values = [grid.scale] if grid.zero_point is None else [grid.scale, grid.zero_point * grid.scale]
    weighted = [torch.bmm(base.transpose(0, 1), by_group).transpose(0, 1) for base in bases]  # [rows, groups, in]
    shape = rows, groups, groups, columns
    gram = torch.cat(
        [torch.cat([torch.einsum("rgkc,rkc->rgk", one.reshape(shape), base) for base in bases], 2) for one in weighted],
        1,
    )
    target = torch.cat([torch.einsum("rgi,ri->rg", one, w) for one in weighted], 1)
    start = torch.cat(values, 1)
    return _Part(start, gram, target - torch.einsum("rnm,rm->rn", gram, start))


def _move_each(part: _Part, grid: Grid, units: torch.Tensor | None) -> None:
    """Every scale and minimum to its best value that can be stored.

    The largest of a block stays, since the unit is chosen for it.
    """
    groups = grid.scale.shape[1]
    for place in range(part.values.shape[1]):
        old = part.values[:, place].clone()
        best = old + part.best_step([place], torch.ones_like(old)[:, None])
        number, group = divmod(place, groups)
        if units is None:
            new = best.half().float() if number else _stored(best, old, grid.scheme)
        else:
            kind = grid.scheme.blocks
            unit = units[:, group // kind.groups, number]
            ratio = best / unit
            small = ratio.round().clamp(0, kind.small[1]) if number else small_scale(ratio, kind)
            is_largest = (old / unit).round().abs() >= kind.small[1]
            new = torch.where(is_largest, old, small * unit)
        new = torch.where(new.isfinite(), new, old)
        part.move([place], (new - old)[:, None])


def _stored(scale: torch.Tensor, old: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Scales [rows] as they are stored; the old ones where that is no number to divide by."""
    rounded = scale.to(getattr(torch, scheme.scale_dtype)).float()
    return torch.where(rounded.abs() < SMALLEST_FLOAT16, old, rounded)


def _move_units(part: _Part, grid: Grid, units: torch.Tensor | None) -> torch.Tensor | None:
    """Every unit to its best value that can be stored, and with it what counts in it."""
    if units is None:
        return None
    kind, groups = grid.scheme.blocks, grid.scale.shape[1]
    units = units.clone()
    for number in range(units.shape[2]):
        for block in range(units.shape[1]):
            first = number * groups + block * kind.groups
            places = list(range(first, first + kind.groups))
            old = units[:, block, number].clone()
            small = (part.values[:, places] / old[:, None]).round()
            new = old + part.best_step(places, small)
            new = (new / kind.factor).half().float() * kind.factor
            usable = new.isfinite() & (new * old > 0)
            units[:, block, number] = torch.where(usable, new, old)
            part.move(places, small * (units[:, block, number] - old)[:, None])
            part.values[:, places] = small * units[:, block, number, None]
    return units
