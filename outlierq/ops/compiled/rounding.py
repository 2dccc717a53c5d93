"""What was compiled when outlierq was installed, where there was a compiler for C, and the rounding of weights and of
inputs with it: native/rows.c, native/tokens.c.

Without it torch does the same in more passes over memory (rounding a weight: 13 instead of one), with the same results,
bit for bit.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Scheme(ctypes.Structure):
    """`struct scheme` of rows.c."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("code_min", ctypes.c_float),
        ("code_max", ctypes.c_float),
    )


@cache
def library_path() -> str | None:
    """The file that was compiled, or None."""
    module = find_spec("outlierq.native.compiled")  # in a folder that is no package: it is no module
    return None if module is None else module.origin


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled, or None. Calls let other threads run."""
    path = library_path()
    if path is None:
        return None
    compiled = ctypes.CDLL(path)
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    compiled.outlierq_round_rows.argtypes = (pointer, pointer, size, size, size, pointer, pointer, pointer, pointer)
    compiled.outlierq_round_tokens.argtypes = (pointer, number, size, size, pointer, pointer)
    compiled.outlierq_scale_rows.argtypes = (pointer, pointer, size, size, pointer)
    # Of pack.c: ops/compiled/packing.py.
    compiled.outlierq_pack.argtypes = (pointer, size, number, number, number, pointer)
    compiled.outlierq_pack_gptq.argtypes = (pointer, size, size, number, number, pointer)
    compiled.outlierq_pack_awq.argtypes = (pointer, size, size, number, pointer)
    compiled.outlierq_gguf_blocks.argtypes = (number, pointer, size, size, size, pointer, pointer, pointer, pointer)
    compiled.outlierq_gguf_superblocks.argtypes = (pointer, size, size, pointer, pointer, pointer, pointer, pointer)
    compiled.outlierq_dequantize.argtypes = (pointer, size, size, pointer, number, pointer, pointer)
    compiled.outlierq_any_masked.argtypes = (pointer, size, number, number)
    if hasattr(compiled, "outlierq_pack_fields"):  # what was compiled may be older
        compiled.outlierq_pack_fields.argtypes = (pointer, size, number, number, number, pointer)
    return compiled


def fresh(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a result, of numpy: torch asks for aligned memory, and what it frees is too small for the padding of
    the next such request, so that glibc takes up to 64 MiB anew in every thread, all of it cleared by the system.
    """
    import numpy as np

    *others, last = shape
    return torch.from_numpy(np.empty((*others, last * dtype.itemsize), np.uint8)).view(dtype)


def round_rows(weight: torch.Tensor, scheme: QuantScheme) -> tuple[QuantTensor, float, float] | None:
    """`weight` [out, in] on its min-max grid, with the sums of the squares of the weights and of their errors.

    None where this is nothing for it (floats, blocks, two-level scales, types of GGUF, other devices), or where
    something is wrong with the numbers: torch then says what.
    """
    plain = (scheme.kind, scheme.scales, scheme.block, scheme.type) == ("int", "plain", None, None)
    scale_dtype = getattr(torch, scheme.scale_dtype)
    if not plain or weight.dtype not in DTYPES or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    compiled = library()
    if compiled is None:
        return None
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    codes = fresh(rows, columns, dtype=torch.int8 if scheme.symmetric else torch.uint8)
    scale = fresh(rows, groups, dtype=scale_dtype)
    zero_point = None if scheme.symmetric else fresh(rows, groups, dtype=torch.uint8)
    sums = (ctypes.c_double * 2)()
    asked = _Scheme(DTYPES[weight.dtype], DTYPES[scale_dtype], scheme.symmetric, scheme.code_min, scheme.code_max)
    wrong = compiled.outlierq_round_rows(
        weight.data_ptr(),
        ctypes.addressof(asked),
        rows,
        groups,
        columns // groups,
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        ctypes.addressof(sums),
    )
    return None if wrong else (QuantTensor(codes, scale, zero_point, scheme), *sums)


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(int8 codes of `x` [tokens, in], float32 scales [tokens, 1]) on the grid of `ops.activations`; None: as above."""
    compiled = library()
    if x.dtype not in DTYPES or x.device.type != "cpu" or not x.is_contiguous() or compiled is None:
        return None
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
    places = (codes.data_ptr(), scale.data_ptr())
    failed = compiled.outlierq_round_tokens(x.data_ptr(), DTYPES[x.dtype], *x.shape, *places)
    return None if failed else (codes, scale)


def scale_rows(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """float32 `values` [rows, columns] times `scale` [rows, 1], in bfloat16; None: as above."""
    compiled = library()
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in (values, scale))
    if not fits or scale.shape != (len(values), 1) or compiled is None:
        return None
    scaled = torch.empty(values.shape, dtype=torch.bfloat16)
    compiled.outlierq_scale_rows(values.data_ptr(), scale.data_ptr(), *values.shape, scaled.data_ptr())
    return scaled
