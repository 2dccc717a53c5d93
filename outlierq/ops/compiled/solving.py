"""The columns of a block rounded one after the other, compiled: native/solve.c.

Every function gives False where there is no compiled code, or nothing in it for what is asked: torch then does the same
(ops/search/columns.py), with the same results, bit for bit.
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


def _fit(grid: ColumnGrid, corner: torch.Tensor, *blocks: torch.Tensor) -> bool:
    """Whether all lie on the CPU as the compiled code takes them, and it knows the grid.

    corner: of a matrix, whose rows may be longer.
    """
    if grid.scheme.kind == "codebook" or (grid.scheme.kind == "float" and grid.scheme.bits == 6):
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
