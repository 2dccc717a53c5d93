"""Tokens times weights of 4 or 8 bits that stay packed: native/products.c, a kernel for each kind of processor.

A weight lies in panels of 16 rows, whose codes in two's complement share int32 words: [panels, words of a row, 16].
Which kernels a machine runs is asked of the machine; before a kernel's first product it must give what torch gives on a
small case, or it is not used and a note says so. Everything here gives None where there is no kernel left.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from outlierq.core.notes import note
from outlierq.ops.compiled import rounding as native

PANEL = 16
PLACES = {4: (0, 16, 4, 20, 8, 24, 12, 28), 8: (0, 8, 16, 24)}  # bits of a word at which its columns begin
# Numbers of `kernels` in products.c, the fastest first; what a kernel takes.
FLOAT_KERNELS = {"AVX-512 bf16": 6, "AVX-512": 4, "AVX2": 2, "portable": 0}
INT8_KERNELS = {"AVX-512 VNNI": 5, "NEON dot product": 7, "AVX2": 3, "portable": 1}
ONLY_BFLOAT16 = "AVX-512 bf16"


def pack_panels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes [out, in] of 4 or 8 bits as int32 [panels, in * bits / 32, 16]; in: a multiple of 32 / bits."""
    filled = F.pad(codes.to(torch.int8), (0, 0, 0, -len(codes) % PANEL))
    several = 32 // bits
    words = filled.new_zeros(len(filled), filled.shape[1] // several, dtype=torch.int32)
    for column, place in enumerate(PLACES[bits]):
        words |= (filled[:, column::several].int() & (1 << bits) - 1) << place
    return words.view(-1, PANEL, words.shape[1]).transpose(1, 2).contiguous()


def unpack_panels(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_panels`: int8 [panels * 16, in]."""
    rows = words.transpose(1, 2).reshape(-1, words.shape[1])
    columns = [rows << (32 - bits - place) >> (32 - bits) for place in PLACES[bits]]
    return torch.stack(columns, -1).view(len(rows), -1).to(torch.int8)


def by_panel(values: torch.Tensor) -> torch.Tensor:
    """Numbers [out, groups] as float32 [panels, groups, 16]; rows that are filled up get zeros."""
    filled = F.pad(values.float(), (0, 0, 0, -len(values) % PANEL))
    return filled.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [out, in] for `multiply_int8`: panels, and under each panel 128 times the sums of its rows."""
    sums = F.pad(128 * codes.sum(1, dtype=torch.int32), (0, -len(codes) % PANEL))
    return torch.cat([pack_panels(codes, 8), sums.view(-1, 1, PANEL)], 1).contiguous()


@cache
def _compiled() -> ctypes.CDLL | None:
    """The library, if it was compiled since it has products."""
    compiled = native.library()
    if compiled is None or not hasattr(compiled, "outlierq_runs_kernel"):
        return None
    size, pointer, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    weight, held, shape = (
        (pointer, number, pointer, pointer),
        (pointer, pointer, size, size),
        (size, size, size, number),
    )
    compiled.outlierq_multiply.argtypes = (number, *weight, *3 * (size,), pointer, number, size, pointer, number)
    compiled.outlierq_multiply_int8.argtypes = (number, *held, pointer, pointer, size, pointer, number, number)
    compiled.outlierq_decode_panels.argtypes = (pointer, size, number, pointer, pointer, *shape, pointer, pointer)
    compiled.outlierq_runs_kernel.argtypes = (number,)
    return compiled


def float_kernel(dtype: torch.dtype) -> str | None:
    """The name of the fastest kernel here for inputs of a dtype."""
    names = (n for n in FLOAT_KERNELS if n != ONLY_BFLOAT16 or dtype == torch.bfloat16)
    return next((name for name in names if dtype in native.DTYPES and _runs(FLOAT_KERNELS[name], name)), None)


def int8_kernel() -> str | None:
    """The name of the fastest kernel here for int8 inputs."""
    return next((name for name, number in INT8_KERNELS.items() if _runs(number, name)), None)


def multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    bits: int,
    rows: int,
    kernel: str | None = None,
) -> torch.Tensor:
    """`x` [tokens, in] times code * scale + offset, [tokens, rows], in the dtype of `x`.

    words: of `pack_panels`. scale, offset: of `by_panel`. kernel: another than the fastest.
    """
    kernel = kernel or float_kernel(x.dtype)
    compiled = _compiled()
    assert compiled is not None and kernel is not None, "nothing was packed for a machine without a kernel"
    x = x.contiguous()
    y = x.new_empty(x.shape[0], rows)
    failed = compiled.outlierq_multiply(
        FLOAT_KERNELS[kernel],
        words.data_ptr(),
        bits,
        scale.data_ptr(),
        None if offset is None else offset.data_ptr(),
        rows,
        x.shape[1],
        scale.shape[1],
        x.data_ptr(),
        native.DTYPES[x.dtype],
        x.shape[0],
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return _unless(failed, y)


def multiply_int8(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    token_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    kernel: str | None = None,
) -> torch.Tensor:
    """int8 `x` [tokens, in] times int8 codes, exact sums times `scale` [out] and `token_scale` [tokens, 1], in `dtype`.

    words: of `pack_int8`.
    """
    kernel = kernel or int8_kernel()
    compiled = _compiled()
    assert compiled is not None and kernel is not None, "nothing was packed for a machine without a kernel"
    x = x.contiguous()
    y = torch.empty(x.shape[0], scale.shape[0], dtype=dtype)
    failed = compiled.outlierq_multiply_int8(
        INT8_KERNELS[kernel],
        words.data_ptr(),
        scale.data_ptr(),
        scale.shape[0],
        x.shape[1],
        x.data_ptr(),
        None if token_scale is None else token_scale.data_ptr(),
        x.shape[0],
        y.data_ptr(),
        native.DTYPES[dtype],
        torch.get_num_threads(),
    )
    return _unless(failed, y)


def decode(
    words: torch.Tensor, bits: int, scale: torch.Tensor | None, offset: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """Whole panels into `out` [panels * 16, in]: code * scale + offset, or the codes without a scale."""
    compiled = _compiled()
    assert compiled is not None, "nothing was packed without compiled code"
    places = (None if part is None else part.data_ptr() for part in (scale, offset))
    groups = 1 if scale is None else scale.shape[1]
    sizes = (len(words), out.shape[1], groups, native.DTYPES[out.dtype])
    row = torch.empty(out.shape[1], dtype=torch.int8)
    held = (words.data_ptr(), words[0].numel(), bits, *places, *sizes)
    compiled.outlierq_decode_panels(*held, row.data_ptr(), out.data_ptr())
    return out


def _unless(failed: int, y: torch.Tensor) -> torch.Tensor:
    """What was computed; MemoryError where there was no room for it."""
    if failed:
        raise MemoryError(f"there is no memory to arrange the inputs of a product of {tuple(y.shape)}")
    return y


@cache
def _runs(number: int, name: str) -> bool:
    """Whether this machine runs a kernel, and it gives what torch gives."""
    compiled = _compiled()
    if compiled is None or not compiled.outlierq_runs_kernel(number):
        return False
    right = _int8_is_right(name) if number in INT8_KERNELS.values() else _float_is_right(name)
    if not right:
        note(f"the compiled product for {name} is not used: it differs from torch's on a small case")
    return right


def _float_is_right(name: str) -> bool:
    """Two groups, rows that fill no panel, few and many tokens; dyadic numbers, so that all sums are exact."""
    generator = torch.Generator().manual_seed(0)
    for bits in (4, 8):
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (20, 48), generator=generator)
        scale, offset = (torch.randint(1, 5, (20, 2), generator=generator) / 4 for _ in range(2))
        dense = (codes.view(20, 2, 24) * scale[..., None] + offset[..., None]).view(20, 48)
        for tokens in (1, 3, 30):
            x = torch.randint(-3, 4, (tokens, 48), generator=generator).bfloat16()
            held = (pack_panels(codes, bits), by_panel(scale), by_panel(offset))
            if not torch.equal(multiply(x, *held, bits, 20, name), F.linear(x.float(), dense).bfloat16()):
                return False
    return True


def _int8_is_right(name: str) -> bool:
    """All values there are, at their extremes too."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (20, 48), dtype=torch.int8, generator=generator)
    codes[0], codes[1] = -128, 127
    for tokens in (1, 3, 30):
        x = torch.randint(-128, 128, (tokens, 48), dtype=torch.int8, generator=generator)
        x[0] = -128
        y = multiply_int8(x, pack_int8(codes), torch.ones(20), None, torch.float32, name)
        if not torch.equal(y.long(), x.long() @ codes.long().T):
            return False
    return True
