"""Independent decoders of 4- and 6-bit floats in compressed-tensors, `nvfp4-pack-quantized` and `mxfp4-pack-quantized`,
`mxfp6-pack-quantized`.

A byte holds two E2M1 numbers (`numbers.e2m1_values`), that of the even column in its low half. NVFP4: 16 columns share
an E4M3 scale, which is divided by one float32 of the whole weight. MXFP4: 32 columns share a power of two, 2^(byte -
127), with 255 for NaN. MXFP6: the same with four E2M3 numbers in three bytes. With numpy alone; shares no code with a
packer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import (
    Numbers,
    Parts,
    as_bytes_array,
    codes_of_three_bytes,
    e2m1_values,
    e2m3_values,
    e4m3_of,
    e4m3_values,
)
from outlierq.load.packed.reading import reads_rows

if TYPE_CHECKING:
    import numpy as np


@reads_rows("compressed-tensors", "weight_packed", "weight_scale")
def e2m1_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Rows [start, stop): codes (as E4M3 numbers), scales as stored. SourceError when they do not fit.

    stored: weight_packed uint8 [out, in * bits / 8], weight_scale [out, groups], weight_global_scale and
    input_global_scale [1] where there are any. shape: (out, in).
    """
    import torch

    packed = as_bytes_array(stored["weight_packed"][start:stop])
    scale, whole = stored["weight_scale"][start:stop], stored.get("weight_global_scale")
    byte_shape = (stop - start, shape[1] * scheme.bits // 8)
    small = torch.float8_e4m3fn if scheme.scales == "two-level" else torch.uint8
    groups = (stop - start, scheme.groups(shape[1]))
    if packed.shape != byte_shape or tuple(scale.shape) != groups or scale.dtype != small:
        raise SourceError(
            f"{scheme} of {shape[0]} x {shape[1]} has bytes {list(byte_shape)} and {small} scales {list(groups)} in "
            f"these rows, found {list(packed.shape)} and {scale.dtype} {list(scale.shape)}"
        )
    check_small_scales(scale, whole)
    codes = _e4m3_of_codes(packed, scheme.bits)
    parts = torch.from_numpy(codes).view(torch.float8_e4m3fn), scale, None, scheme
    return QuantTensor(*parts, input_scale=stored.get("input_global_scale"), super_scale=whole)


def _e4m3_of_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The E4M3 bytes [rows, in] of codes of 4 or 6 bits in bytes [rows, in * bits / 8]."""
    import numpy as np

    if bits == 6:
        return e4m3_of(e2m3_values())[codes_of_three_bytes(packed)]
    halves, byte_of = np.arange(256), e4m3_of(e2m1_values())
    pairs = np.stack([byte_of[halves & 15], byte_of[halves >> 4]], -1).view("<u2")[:, 0]  # two codes at a time
    return pairs[packed].view(np.uint8).reshape(len(packed), -1)


def decode_e2m1(
    weight_packed: Numbers, weight_scale: Numbers, weight_global_scale: Numbers | None = None, *, bits: int = 4
) -> np.ndarray:
    """Float32 [out, in]. weight_packed: bytes [out, in * bits / 8] of 4 or 6 bits. weight_scale: [out, groups], E4M3
    with weight_global_scale [1], or else exponents. SourceError when they do not fit or a scale is NaN.
    """
    import numpy as np

    packed, scale = as_bytes_array(weight_packed), as_bytes_array(weight_scale)
    rows, columns = packed.shape[0], packed.shape[1] * 8 // bits
    if scale.ndim != 2 or len(scale) != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise SourceError(f"scales {list(scale.shape)} do not fit weights {rows} x {columns}")
    check_small_scales(weight_scale, weight_global_scale)
    if weight_global_scale is not None:
        factor = e4m3_values()[scale] / np.float32(weight_global_scale.reshape(-1)[0])
    else:
        factor = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    if bits == 6:
        weight = e2m3_values()[codes_of_three_bytes(packed)].reshape(rows, scale.shape[1], -1)
    else:
        pairs = np.stack([e2m1_values()[np.arange(256) & 15], e2m1_values()[np.arange(256) >> 4]], -1)
        weight = pairs[packed].reshape(rows, scale.shape[1], -1)
    weight *= factor[..., None]
    return weight.reshape(rows, columns)


def check_small_scales(small: Numbers, whole: Numbers | None) -> None:
    """SourceError for a divisor that is no positive number, and for exponents that are NaN. E4M3 scales may be
    anything.
    """
    scale = as_bytes_array(small)
    if whole is not None and not 0 < float(whole.reshape(-1)[0]) < float("inf"):
        raise SourceError(f"the global scale is {float(whole.reshape(-1)[0]):g}; scales are divided by it")
    if whole is None and (scale == 255).any():
        raise SourceError(f"{int((scale == 255).sum())} scales are NaN (255)")


def check_nothing(name: str, codes: Numbers, signs: int = 0x88) -> None:
    """SourceError for codes that are not 0, of a weight whose scales, or exponents of scales, all are.

    codes: bytes [out, any]. signs: the bits of a byte that are signs; those of two codes where none is said.
    """
    if (as_bytes_array(codes) & (0xFF ^ signs)).any():
        raise SourceError(f"all scales of {name} are 0 over weights that are not")
