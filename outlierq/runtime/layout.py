"""The layouts of torch's CPU products, and back.

torch keeps a 4-bit weight in strips of output rows, as many as four of the processor's vectors hold: for each input
column the codes of a strip lie side by side, rows r and r + strip / 2 in one byte, the lower in the lower half. Codes
are 0 to 15 and stand for (code - 8) * scale + zero, with a bfloat16 pair (scale, zero) for every group of columns. The
packer is torch's own; this module undoes it, because for many tokens decoding is faster than torch's product. int8
weights that meet int8 inputs lie as oneDNN likes them. `kernels/layout.py` is that of the GPU kernels,
`export/layout.py` that of files.
"""

from __future__ import annotations

from functools import cache

import torch

GROUP_SIZES = (256, 128, 64, 32)  # those that torch's product takes
STRIPS = (64, 32)  # rows of a strip with AVX-512, and with narrower vectors
MIDDLE = 8


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in], 0 to 15, in torch's layout: uint8 [out, in / 2]. out: a multiple of the strip; in: of 32."""
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def unpack_int4(words: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The inverse of `pack_int4`, less the middle: int8 [out, in], -8 to 7. Whole strips may be cut from `words`.

    out: [out, in] of any dtype, to write into.
    """
    strip = strip_rows()
    assert strip is not None, "this processor's 4-bit layout is not known, so nothing was packed"
    return _unpack(words, strip, out)


def pack_scale(scale: torch.Tensor, zero_point: torch.Tensor | None, repeats: int) -> torch.Tensor:
    """The pairs (scale, zero) [groups * repeats, out, 2] for a scale and zero points [out, groups].

    zero = (8 - zero_point) * scale, 0 without zero points. repeats: groups of ours that torch sees for each group.
    """
    zero = torch.zeros_like(scale) if zero_point is None else (MIDDLE - zero_point.float()) * scale.float()
    pairs = torch.stack([scale.bfloat16(), zero.bfloat16()], -1)
    return pairs.repeat_interleave(repeats, 1).transpose(0, 1).contiguous()


def fitting_group(width: int) -> int | None:
    """The widest group that torch takes and that divides groups of `width` columns."""
    return next((size for size in GROUP_SIZES if width % size == 0), None)


def pack_int8(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [out, in] in the order that oneDNN reads them, an opaque tensor [in, out]; `to_dense` undoes it.

    The codes themselves where oneDNN has no exact product: it then differs by processor (see `int8_is_exact`).
    """
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None) if int8_is_exact() else codes.contiguous()


def unpack_int8(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int8`: int8 codes [out, in]."""
    return words.to_dense().t() if words.is_mkldnn else words


@cache
def int8_is_exact() -> bool:
    """Whether oneDNN multiplies int8 here without a fault; without VNNI its 16-bit sums of two products saturate."""
    x, codes = torch.full((2, 64), -128, dtype=torch.int8), torch.full((16, 64), -127, dtype=torch.int8)
    x[1], codes[1::2] = 127, 127
    try:
        y = qlinear(x, torch.ops.onednn.qlinear_prepack(codes, None), torch.ones(16))
    except (RuntimeError, AttributeError):  # torch without oneDNN, or a processor that it does not serve
        return False
    return torch.equal(y.long(), x.long() @ codes.long().t())


def qlinear(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, out]: int8 `x` times packed codes, summed in int32, times `scale` [out]."""
    zeros = torch.zeros(scale.shape[0], dtype=torch.int32)
    nothing: list[float] = []
    ending = (None, 1.0, 0, torch.float32, "none", nothing, "")  # no bias, no scale of the output, nothing after it
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, words, scale, zeros, *ending)
    return product


@cache
def strip_rows() -> int | None:
    """Rows of a strip on this processor, found by packing and unpacking; None for a layout that is not known here."""
    codes = torch.arange(128 * 32).mul_(7).div_(5, rounding_mode="floor").remainder_(16).view(128, 32)
    packed = pack_int4(codes)
    return next((rows for rows in STRIPS if torch.equal(_unpack(packed, rows) + MIDDLE, codes.to(torch.int8))), None)


def _unpack(words: torch.Tensor, strip: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Columns of bytes become rows; flipping the top bit of each half makes it two's complement."""
    rows, half = words.shape
    turned = words.view(rows // strip, 2 * half, strip // 2).transpose(1, 2).contiguous()
    both = turned.bitwise_xor_(0x88).view(torch.int8)
    codes = both.new_empty(rows, 2 * half) if out is None else out
    halves = codes.view(rows // strip, 2, strip // 2, 2 * half)
    halves[:, 1] = both >> 4
    halves[:, 0] = both.bitwise_left_shift_(4).bitwise_right_shift_(4)
    return codes
