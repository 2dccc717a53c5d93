"""Packing and unpacking in one pass over memory: native/pack.c, compiled when outlierq was installed.

Every function gives None where there is no compiled code, or nothing in it for what is asked: numpy or torch then does
the same, to the same byte.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.ops.compiled import rounding as native

if TYPE_CHECKING:
    import ctypes

    import numpy as np

WORD = 32
# `enum block` of pack.c, columns of a block, its bytes. Superblocks have a function of their own.
GGUF_BLOCKS = {
    "Q4_0": (0, 32, 18),
    "Q4_1": (1, 32, 20),
    "Q8_0": (2, 32, 34),
    "MXFP4": (3, 32, 17),
    "Q4_K": (None, 256, 144),
}


def bit_string(codes: torch.Tensor, bits: int, flip: int = 0, *, e2m1: bool = False) -> torch.Tensor | None:
    """Codes of one byte, contiguous and on the CPU, a multiple of 8 in number, as uint8 [codes * bits / 8].

    flip: as in `packing.pack_bytes`. e2m1: the codes are yet to be made, as in `packing.e2m1_codes`.
    """
    compiled, count = _compiled(), codes.numel()
    if compiled is None:
        return None
    packed = native.fresh(count * bits // 8, dtype=torch.uint8)
    compiled.outlierq_pack(codes.data_ptr(), count // 8, bits, flip, e2m1, packed.data_ptr())
    return packed


def gptq_words(codes: torch.Tensor, bits: int, flip: int) -> torch.Tensor | None:
    """`packing.pack_down` of codes [out, in] of one byte, contiguous and on the CPU, where `in` is a multiple of 32."""
    compiled, (rows, columns) = _compiled(), codes.shape
    if compiled is None or columns % WORD:
        return None
    words = native.fresh(columns * bits // WORD, rows, dtype=torch.int32)
    compiled.outlierq_pack_gptq(codes.data_ptr(), rows, columns, bits, flip, words.data_ptr())
    return words


def awq_words(codes: torch.Tensor, flip: int) -> torch.Tensor | None:
    """Codes [out, n] of one byte, contiguous and on the CPU, as the words [n, out / 8] of AWQ."""
    compiled, (rows, columns) = _compiled(), codes.shape
    if compiled is None:
        return None
    words = native.fresh(columns, rows // 8, dtype=torch.int32)
    compiled.outlierq_pack_awq(codes.data_ptr(), rows, columns, flip, words.data_ptr())
    return words


def gguf_blocks(kind: str, quantized: QuantTensor, order: torch.Tensor | None) -> torch.Tensor | None:
    """Uint8 [out, bytes of a row]: the blocks of a type of GGUF. order: int64, the source's row at each place."""
    compiled, (rows, columns) = _compiled(), quantized.shape
    codes, scale, zero_point = quantized.codes, quantized.scale, quantized.zero_point
    fits = scale.dtype == (torch.uint8 if kind in ("Q4_K", "MXFP4") else torch.float16)
    if compiled is None or not fits or not _are_bytes(codes, zero_point) or not _plain(scale, quantized.super_scale):
        return None
    number, width, nbytes = GGUF_BLOCKS[kind]
    count, groups = columns // width, scale.shape[1]
    blocks = native.fresh(rows, count * nbytes, dtype=torch.uint8)
    given, scales = codes.data_ptr(), scale.data_ptr()
    zeros, units, places = (
        None if part is None else part.data_ptr() for part in (zero_point, quantized.super_scale, order)
    )
    if units is not None:
        compiled.outlierq_gguf_superblocks(given, rows, count, scales, zeros, units, places, blocks.data_ptr())
    else:
        compiled.outlierq_gguf_blocks(
            number, given, rows, groups, count // groups, scales, zeros, places, blocks.data_ptr()
        )
    return blocks


def fields(codes: np.ndarray, bits: int, run: int, shift: int) -> np.ndarray | None:
    """`bits` bits of uint8 codes of any shape, contiguous, those from `shift` on, as uint8 [codes * bits / 8].

    run: of so many bytes first the lowest bits hold codes, one after the other, then the next.
    """
    import numpy as np

    compiled = _compiled()
    if compiled is None or not hasattr(compiled, "outlierq_pack_fields"):  # older than it
        return None
    packed = np.empty(codes.size * bits // 8, np.uint8)
    runs = packed.size // run
    done = compiled.outlierq_pack_fields(codes.ctypes.data, runs, shift, bits, run, packed.ctypes.data)
    return packed if done else None


def dequantize(quantized: QuantTensor) -> torch.Tensor | None:
    """`QuantTensor.dequantize`, [out, in], in the dtype of the scales; integers with plain scales by row and group."""
    scheme, scale, dtype = quantized.scheme, quantized.scale, getattr(torch, quantized.scheme.scale_dtype)
    plain = (scheme.kind, scheme.scales, scheme.block) == ("int", "plain", None) and scale.dtype == dtype
    compiled = _compiled() if plain and quantized.outlier_columns is None else None
    if compiled is None or not _are_bytes(quantized.codes, quantized.zero_point) or not _plain(scale):
        return None
    dense = native.fresh(*quantized.shape, dtype=dtype)
    compiled.outlierq_dequantize(
        quantized.codes.data_ptr(),
        scale.numel(),
        quantized.codes.numel() // scale.numel(),
        scale.data_ptr(),
        native.DTYPES[dtype],
        None if quantized.zero_point is None else quantized.zero_point.data_ptr(),
        dense.data_ptr(),
    )
    return dense


def any_masked(numbers: torch.Tensor, mask: int) -> bool | None:
    """Whether all bits of `mask` are set in any of some numbers of one or two bytes, of any shape."""
    compiled = native.library()
    if compiled is None or not _plain(numbers):
        return None
    return bool(compiled.outlierq_any_masked(numbers.data_ptr(), numbers.numel(), numbers.element_size(), mask))


def _compiled() -> ctypes.CDLL | None:
    """The library, where bytes of a word lie as it takes them to."""
    return native.library() if sys.byteorder == "little" else None


def _are_bytes(codes: torch.Tensor, zero_point: torch.Tensor | None) -> bool:
    """Whether codes (signed without zero points, else unsigned) and zero points are bytes that lie as they should."""
    fits = codes.dtype == torch.uint8 if zero_point is not None else codes.dtype in (torch.int8, torch.float8_e4m3fn)
    return fits and _plain(codes, zero_point) and (zero_point is None or zero_point.dtype == torch.uint8)


def _plain(*parts: torch.Tensor | None) -> bool:
    """Whether all lie contiguous on the CPU."""
    return all(part is None or (part.device.type == "cpu" and part.is_contiguous()) for part in parts)
