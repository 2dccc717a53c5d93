"""The columns of a block rounded one after the other, and what whole groups of columns lose, compiled: native/solve.c.

Those of blocks give None or False where there is no compiled code, or nothing in it for what is asked: torch then does
the same (ops/search/columns.py), with the same results, bit for bit.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.compiled.rounding import library

if TYPE_CHECKING:
    from outlierq.ops.search.columns import ColumnGrid

# `enum kind` of solve.c.
INTEGERS, FRACTIONAL_ZEROS, E2M1, E4M3 = range(4)
# Columns of a group: so many at most, and how many of them are summed up at a time (solve.c).
WIDEST, AT_ONCE = 256, 4
LANES = 16  # rows that are worked on at a time


class _Grid(ctypes.Structure):
    """`struct grid` of solve.c."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("code_min", ctypes.c_float),
        ("code_max", ctypes.c_float),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("group_of", ctypes.c_void_p),
    )


@cache
def _compiled() -> ctypes.CDLL | None:
    """The library, unless it is older than this file."""
    compiled = library()
    if compiled is None or not hasattr(compiled, "outlierq_sweep"):
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    compiled.outlierq_sweep.argtypes = (pointer, size, size, pointer, pointer, pointer, pointer, size, pointer)
    compiled.outlierq_descend.argtypes = (
        *(pointer, size, size, pointer, pointer, pointer, pointer),
        *(pointer, size, pointer),
    )
    if hasattr(compiled, "outlierq_group_errors"):  # what was compiled may be older
        compiled.outlierq_group_errors.argtypes = (pointer, size, size, size, pointer, pointer, pointer)
        compiled.outlierq_group_fits.argtypes = (pointer, size, size, size, pointer, pointer, pointer, pointer)
    return compiled


def available() -> bool:
    """Whether there is compiled code at all."""
    return _compiled() is not None


def sweep_block(
    grid: ColumnGrid, values: torch.Tensor, errors: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor | None:
    """`columns.sweep_block`."""
    compiled = _compiled()
    if compiled is None or not _fit(grid, factor, values, errors):
        return None
    codes, inverse = torch.empty_like(values), factor.diagonal().reciprocal()
    given = _grid_of(grid)
    places = (values.data_ptr(), errors.data_ptr(), codes.data_ptr(), factor.data_ptr())
    failed = compiled.outlierq_sweep(
        ctypes.addressof(given), *values.shape, *places, factor.stride(0), inverse.data_ptr()
    )
    return None if failed else codes


def descend_block(
    grid: ColumnGrid,
    codes: torch.Tensor,
    residuals: torch.Tensor,
    moved: torch.Tensor,
    gains: torch.Tensor,
    hessian: torch.Tensor,
    inverse: torch.Tensor,
) -> bool:
    """`columns.descend_block`."""
    compiled = _compiled()
    if compiled is None or not _fit(grid, hessian, codes, residuals, moved):
        return False
    given = _grid_of(grid)
    places = (codes.data_ptr(), residuals.data_ptr(), moved.data_ptr(), gains.data_ptr(), hessian.data_ptr())
    return not compiled.outlierq_descend(
        ctypes.addressof(given), *codes.shape, *places, hessian.stride(0), inverse.data_ptr()
    )


def sums_up(scheme: QuantScheme, columns: int) -> bool:
    """Whether `group_errors` and `group_fits` know groups of so many columns."""
    known = _compiled() is not None and hasattr(_compiled(), "outlierq_group_errors") and _knows(scheme)
    return known and columns <= WIDEST and columns % AT_ONCE == 0 and scheme.block is None


def in_lanes(grouped: torch.Tensor) -> torch.Tensor:
    """W [rows, groups, columns] as [groups, rows / 16, columns, 16], filled up with zeros: 16 rows lie together."""
    rows, groups, columns = grouped.shape
    whole = torch.nn.functional.pad(grouped, (0, 0, 0, 0, 0, -rows % LANES))
    return whole.view(-1, LANES, groups, columns).permute(2, 0, 3, 1).contiguous()


def group_errors(grid: ColumnGrid, values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """d^T B d [groups, rows] for the change d that rounding makes to each group; sums run over columns in their order.

    values: W as `in_lanes` gives it; blocks: [groups, columns, columns], symmetric; float32 on the CPU. Only where
    `sums_up`.
    """
    found = torch.empty_like(grid.scale)
    _summed("outlierq_group_errors", grid, values, blocks, found)
    return found


def group_fits(grid: ColumnGrid, values: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c^T B c and c^T B w [groups, rows] for the codes c of each group, less their zero points; the same otherwise."""
    power, product = torch.empty_like(grid.scale), torch.empty_like(grid.scale)
    _summed("outlierq_group_fits", grid, values, blocks, power, product)
    return power, product


def _summed(name: str, grid: ColumnGrid, values: torch.Tensor, blocks: torch.Tensor, *found: torch.Tensor) -> None:
    """Call a function of solve.c over groups."""
    assert all(each.is_contiguous() and each.dtype == torch.float32 for each in (grid.scale, values, blocks)), name
    given, (groups, columns, _) = _grid_of(grid), blocks.shape
    places = (each.data_ptr() for each in (values, blocks, *found))
    getattr(_compiled(), name)(ctypes.addressof(given), groups, columns, grid.scale.shape[1], *places)


def _knows(scheme: QuantScheme) -> bool:
    """Whether `encode` of solve.c has codes of this kind."""
    return scheme.vector == 1 and scheme.kind in ("int", "float") and (scheme.kind, scheme.bits) != ("float", 6)


def _fit(grid: ColumnGrid, corner: torch.Tensor, *blocks: torch.Tensor) -> bool:
    """Whether all lie on the CPU as the compiled code takes them, and it knows the grid.

    corner: of a matrix, whose rows may be longer.
    """
    if not _knows(grid.scheme):
        return False
    parts = [corner[0], *blocks, grid.scale, *([] if grid.zero_point is None else [grid.zero_point])]
    return all(part.device.type == "cpu" and part.is_contiguous() and part.dtype == torch.float32 for part in parts)


def _grid_of(grid: ColumnGrid) -> _Grid:
    """Pointers into a grid, which the caller keeps as long."""
    zeros = None if grid.zero_point is None else grid.zero_point.data_ptr()
    scheme = grid.scheme
    places = (grid.scale.data_ptr(), zeros, grid.group_of.data_ptr())
    return _Grid(_kind(scheme), scheme.code_min, scheme.code_max, *places)


def _kind(scheme: QuantScheme) -> int:
    """How `grid.nearest_code` rounds."""
    if scheme.kind == "float":
        return E2M1 if scheme.bits == 4 else E4M3
    return FRACTIONAL_ZEROS if scheme.has_real_minima else INTEGERS
