"""Rounding weights to the types of GGUF in one pass: native/types.c, compiled when outlierq was installed.

Without it torch does the same in some hundred passes over memory, with the same results, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.ops.codebooks import levels
from outlierq.ops.compiled.rounding import DTYPES, fresh, library

LEVELS = 16  # values of a table
SYMMETRIC, MINIMA, TABLE = range(3)  # `enum grid` of types.c


class _Type(ctypes.Structure):
    """`struct type` of types.c."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("grid", "columns", "block", "turns")),
        *((name, ctypes.c_float) for name in ("code_min", "code_max", "small_min", "small_max")),
        ("table", ctypes.c_float * LEVELS),
        ("between", ctypes.c_float * LEVELS),
    )


class _Output(ctypes.Structure):
    """`struct output` of types.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("codes", "scales", "minima", "units"))


def round_types(
    weight: torch.Tensor, scheme: QuantScheme, *, searched: bool
) -> tuple[QuantTensor, float, float] | None:
    """`weight` [out, in] on the grid of a type of GGUF, with the sums of the squares of the weights and of the errors.

    searched: whether the scales with the least error are looked for, or the grid just holds every group. None where
    this is nothing for it (floats, codes for several weights, other devices), or where something is wrong with the
    numbers: torch then says what.
    """
    function = _rounding()
    fits = scheme.type is not None and scheme.kind != "float" and scheme.vector == 1
    if function is None or not fits or weight.dtype not in DTYPES or weight.device.type != "cpu":
        return None
    if not weight.is_contiguous():
        return None
    rows, columns = weight.shape
    made = _empty(rows, columns, scheme)
    parts = (made.codes, made.scale, made.zero_point, made.super_scale)
    places = _Output(*(None if part is None else part.data_ptr() for part in parts))
    sums, asked = (ctypes.c_double * 2)(), _described(scheme)
    wrong = function(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        ctypes.addressof(asked),
        searched,
        rows * scheme.groups(columns),
        ctypes.addressof(places),
        sums,
    )
    return None if wrong else (made, *sums)


def _empty(rows: int, columns: int, scheme: QuantScheme) -> QuantTensor:
    """Memory for the result."""
    groups, kind, byte = scheme.groups(columns), scheme.blocks, torch.int8 if scheme.symmetric else torch.uint8
    codes, scale, zero, units = fresh(rows, columns, dtype=byte), None, None, None
    if not scheme.has_units:
        scale = fresh(rows, groups, dtype=torch.float16)
        zero = None if scheme.symmetric else fresh(rows, groups, dtype=torch.float16)
        return QuantTensor(codes, scale, zero, scheme)
    scale = fresh(rows, groups, dtype=byte)
    zero = None if scheme.symmetric else fresh(rows, groups, dtype=torch.uint8)
    units = fresh(rows, groups // kind.groups, 1 if scheme.symmetric else 2, dtype=torch.float16)
    return QuantTensor(codes, scale, zero, scheme, super_scale=units)


@cache
def _described(scheme: QuantScheme) -> _Type:
    """A scheme as the compiled function takes it."""
    grid = TABLE if scheme.kind == "codebook" else SYMMETRIC if scheme.symmetric else MINIMA
    values = levels(scheme.blocks.name) if grid == TABLE else torch.zeros(0)
    between = (values[1:] + values[:-1]) / 2
    turns = scheme.symmetric and scheme.bits <= 4
    block = scheme.blocks.groups if scheme.has_units else 0
    table = (ctypes.c_float * LEVELS)(*values.tolist())
    ends = (ctypes.c_float * LEVELS)(*between.tolist())
    size = scheme.columns_per_group(scheme.blocks.columns)
    return _Type(grid, size, block, turns, scheme.code_min, scheme.code_max, *scheme.blocks.small, table, ends)


@cache
def _rounding() -> Callable[..., int] | None:
    """The compiled function; None where there is none, or what was compiled is older than it."""
    compiled = library()
    if compiled is None or not hasattr(compiled, "outlierq_round_types"):
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    function = compiled.outlierq_round_types
    function.argtypes = (pointer, number, pointer, number, size, pointer, pointer)
    return function
