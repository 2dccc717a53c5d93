"""Columns of some rows rounded one after the other, within one block: the inner loops of GPTQ and of its refinement.

Everything is [columns, rows] here: a column is then contiguous, and rows, which do not depend on each other, fill the
vectors of the processor. What is written here in torch is the definition; the compiled code (ops/compiled/solving.py)
does the same operations in the same order, products and sums apart, so that results are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from outlierq.core.notes import note
from outlierq.core.scheme import QuantScheme
from outlierq.ops.compiled import solving as native
from outlierq.ops.grid import Grid, nearest_code, storable


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of some rows, [groups, rows] float32; what `Grid` holds as [rows, groups]. Its scales may be changed.

    units: of two-level scales, as `Grid` has them, or None. group_of: int64 [columns], the group of every column.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme
    units: torch.Tensor | None
    group_of: torch.Tensor

    @classmethod
    def of(cls, grid: Grid, columns: int) -> ColumnGrid:
        """A copy of `grid`, for rows of so many columns."""
        group_of = torch.arange(columns, device=grid.scale.device) // grid.scheme.columns_per_group(columns)
        zero_point = None if grid.zero_point is None else _turned(grid.zero_point)
        return cls(_turned(grid.scale), zero_point, grid.scheme, grid.units, group_of)

    def by_rows(self) -> Grid:
        """The same as a `Grid`."""
        zero_point = None if self.zero_point is None else _turned(self.zero_point)
        return Grid(_turned(self.scale), zero_point, self.scheme, self.units)

    def part(self, columns: slice | torch.Tensor) -> ColumnGrid:
        """The same for some of the columns; scales and zero points are shared."""
        return replace(self, group_of=self.group_of[columns])

    def with_scale(self, number: int, scale: torch.Tensor) -> ColumnGrid:
        """One group with another scale [rows], rounded to what can be stored."""
        zero_point = None if self.zero_point is None else self.zero_point[number, :, None]
        units = self.units
        if units is not None and units.dim() == 3:
            units = units[:, number // self.scheme.blocks.groups, None]
        largest = torch.finfo(getattr(torch, self.scheme.scale_dtype)).max
        grid = storable(scale.clamp(-largest, largest)[:, None], zero_point, self.scheme, units)
        return replace(
            self, scale=grid.scale.T, zero_point=None if grid.zero_point is None else grid.zero_point.T, units=units
        )

    def take(self, number: int, other: ColumnGrid, places: torch.Tensor) -> None:
        """Change one group to that of `other`, which has no more, in some rows. places: bool [rows]."""
        self.scale[number] = torch.where(places, other.scale[0], self.scale[number])
        if self.zero_point is not None and other.zero_point is not None:
            self.zero_point[number] = torch.where(places, other.zero_point[0], self.zero_point[number])

    def centred(self, codes: torch.Tensor, number: int) -> torch.Tensor:
        """Codes [columns, rows] of one group, less its zero point."""
        return codes if self.zero_point is None else codes - self.zero_point[number]

    def values(self, codes: torch.Tensor, number: int) -> torch.Tensor:
        """The weights that codes [columns, rows] of one group stand for."""
        return self.centred(codes, number) * self.scale[number]


def _turned(values: torch.Tensor) -> torch.Tensor:
    """A transposed copy."""
    return values.T.clone(memory_format=torch.contiguous_format)


def sweep_block(grid: ColumnGrid, values: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Codes [columns, rows] of a block by GPTQ; `values` W become W - Q, `errors` become (W - Q) R.

    grid: of these columns (`ColumnGrid.part`). errors: what the columns before this block have added to
    (W - Q) R. factor: the block's corner of R. One column after the other, w + errors / R_ii is rounded, and what it
    loses is passed on.
    """
    if _trusted():
        codes = native.sweep_block(grid, values, errors, factor)
        if codes is not None:
            return codes
    return swept(grid, values, errors, factor)


def swept(grid: ColumnGrid, values: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`sweep_block` in torch."""
    inverse, codes, groups = factor.diagonal().reciprocal(), torch.empty_like(values), grid.group_of.tolist()
    for i, group in enumerate(groups):
        scale, zero = grid.scale[group], None if grid.zero_point is None else grid.zero_point[group]
        ratio = torch.mul(errors[i], inverse[i : i + 1]).add_(values[i]).div_(scale)
        codes[i] = nearest_code(ratio, zero, grid.scheme)
        values[i] -= (ratio if zero is None else ratio - zero) * scale
        errors[i + 1 :] += factor[i, i + 1 :, None] * values[i]
        errors[i] += values[i] * factor[i, i : i + 1]
    return codes


def descend_block(
    grid: ColumnGrid,
    codes: torch.Tensor,
    residuals: torch.Tensor,
    moved: torch.Tensor,
    gains: torch.Tensor,
    hessian: torch.Tensor,
) -> None:
    """One pass of coordinate descent over a block; changes `codes`, adds to `moved` what Q moved by, to `gains` [rows]
    (float64) what the error fell by.

    residuals: H (W - Q)^T of these columns; hessian: the block's corner of H. The best value of column j given all
    others is q_j + r_j / H_jj; it is rounded to the grid, and the residuals lose (change of q_j) * H_j.
    """
    inverse = hessian.diagonal().clamp(min=1e-30).reciprocal()
    given = codes, residuals, moved, gains, hessian, inverse
    if not (_trusted() and native.descend_block(grid, *given)):
        descended(grid, *given)


def descended(
    grid: ColumnGrid,
    codes: torch.Tensor,
    residuals: torch.Tensor,
    moved: torch.Tensor,
    gains: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
) -> None:
    """`descend_block` in torch."""
    left, gained = residuals.clone(), torch.zeros_like(gains)
    for i, group in enumerate(grid.group_of.tolist()):
        scale, zero = grid.scale[group], None if grid.zero_point is None else grid.zero_point[group]
        value = (codes[i] if zero is None else codes[i] - zero) * scale
        ratio = torch.mul(left[i], inverse[i : i + 1]).add_(value).div_(scale)
        codes[i] = nearest_code(ratio, zero, grid.scheme)
        step = (ratio if zero is None else ratio - zero) * scale - value
        gained += (step * (left[i] * 2 - step * hessian[i, i : i + 1])).double()
        moved[i] += step
        left[i + 1 :] -= hessian[i, i + 1 :, None] * step
    gains += gained


def check_compiled() -> None:
    """Note it where compiled code is there and does not do what torch does: torch then does it all."""
    if native.available() and not _trusted():
        note("the compiled solver does not give what torch gives: torch solves instead, slower")


@cache
def _trusted() -> bool:
    """Whether the compiled code gives what torch gives, tried once on a small case of every kind of grid."""
    return native.available() and all(_agrees(scheme) for scheme in _TRIED)


_TRIED = (
    QuantScheme(4, 8),
    QuantScheme(8, 8, symmetric=False),
    QuantScheme(4, 8, kind="float", scale_dtype="float32"),
    QuantScheme(8, 8, kind="float", scale_dtype="float32"),
)


def _agrees(scheme: QuantScheme) -> bool:
    """Whether both give the same for 21 rows of 24 columns."""
    random = torch.Generator().manual_seed(0)
    values, pulled = torch.randn(2, 24, 21, generator=random)
    scale = torch.rand(3, 21, generator=random).add_(0.1)
    zero_point = None if scheme.symmetric else torch.randint(0, 99, (3, 21), generator=random).float()
    grid = ColumnGrid(scale, zero_point, scheme, None, torch.arange(24) // 8)
    factor = torch.rand(24, 24, generator=random).triu_().add_(torch.eye(24))
    here, there = (values.clone(), pulled.clone()), (values.clone(), pulled.clone())
    codes, compiled = swept(grid, *here, factor), native.sweep_block(grid, *there, factor)
    if compiled is None or not all(map(torch.equal, (codes, *here), (compiled, *there))):
        return False
    here, there = (codes.clone(), torch.zeros_like(codes)), (codes.clone(), torch.zeros_like(codes))
    gained, gains = torch.zeros(2, 21, dtype=torch.float64)
    inverse = factor.diagonal().reciprocal()
    descended(grid, here[0], pulled, here[1], gained, factor, inverse)
    done = native.descend_block(grid, there[0], pulled, there[1], gains, factor, inverse)
    return done and all(map(torch.equal, (*here, gained), (*there, gains)))
