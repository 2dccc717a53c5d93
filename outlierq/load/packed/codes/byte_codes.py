"""compressed-tensors `int-quantized` and `float-quantized`, one byte per code, with numpy alone.

The decoders verify what an exporter wrote, so they share no code with any packer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.e2m1 import check_small_scales
from outlierq.load.packed.codes.numbers import Numbers, Parts, as_array, as_bytes_array, as_floats, e4m3_values
from outlierq.load.packed.reading import reads_rows

if TYPE_CHECKING:
    import numpy as np
    import torch


@reads_rows("compressed-tensors", "weight", "weight_scale")
def byte_rows(
    stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int
) -> QuantTensor | torch.Tensor:
    """Output rows [start, stop), float32 [stop - start, in]; codes of MXFP8. start: a multiple of a block's height.

    stored: weight [out, in] and weight_scale. SourceError when they do not fit.
    """
    import torch

    if scheme.scales == "power-of-two":
        return mxfp8_rows(stored, scheme, shape, start, stop)
    codes, scale = stored["weight"][start:stop], stored["weight_scale"]
    if scheme.kind == "int":
        return torch.from_numpy(decode_int_quantized(codes, scale[start:stop]))
    if scheme.block is None:
        return torch.from_numpy(decode_float_quantized(codes, scale[start:stop]))
    return torch.from_numpy(decode_float_quantized(codes, scale, block=scheme.block, first_row=start))


def mxfp8_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Rows [start, stop): codes and exponents as stored. SourceError when they do not fit, or one is NaN.

    stored: weight [out, in] E4M3, weight_scale [out, groups] uint8.
    """
    codes, scale = stored["weight"][start:stop], stored["weight_scale"][start:stop]
    groups = (stop - start, scheme.groups(shape[1]))
    if tuple(codes.shape) != (stop - start, shape[1]) or tuple(scale.shape) != groups:
        raise SourceError(f"codes {list(codes.shape)} and scales {list(scale.shape)} are not those of {scheme}")
    _check_mxfp8(codes, scale)
    return QuantTensor(codes, scale, None, scheme)


def decode_mxfp8(weight: Numbers, weight_scale: Numbers) -> np.ndarray:
    """Float32 [out, in] of `mxfp8-quantized`: E4M3 value * 2^(byte - 127). weight_scale: [out, groups] bytes.

    SourceError when they do not fit, a value is NaN or an exponent 255, which stands for NaN.
    """
    import numpy as np

    _check_mxfp8(weight, weight_scale)
    exponents = as_bytes_array(weight_scale).astype(np.int32) - 127
    return _scaled(e4m3_values()[as_bytes_array(weight)], np.ldexp(np.float32(1), exponents))


def _check_mxfp8(weight: Numbers, weight_scale: Numbers) -> None:
    """SourceError where an exponent or a value is NaN."""
    check_small_scales(weight_scale, None)
    if ((as_bytes_array(weight) & 0x7F) == 0x7F).any():
        raise SourceError("mxfp8-quantized weights hold a NaN")


def decode_int_quantized(weight: Numbers, weight_scale: Numbers) -> np.ndarray:
    """Float32 [out, in] of `int-quantized`: code * scale. weight: [out, in] int8. weight_scale: [out, groups].

    SourceError when the groups do not divide the columns.
    """
    import numpy as np

    codes = as_array(weight)
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise SourceError(f"int-quantized codes are a matrix of int8, found {codes.dtype} {list(codes.shape)}")
    return _scaled(codes.astype(np.float32), as_floats(weight_scale))


def decode_float_quantized(
    weight: Numbers, weight_scale: Numbers, *, block: tuple[int, int] | None = None, first_row: int = 0
) -> np.ndarray:
    """Float32 [out, in] of `float-quantized`: E4M3 value * scale.

    weight: [out, in], a float8_e4m3fn tensor or its bytes. weight_scale: [out, 1], one value, or one per block of
    `block` rows and columns, ragged at the edges. first_row: where these rows begin in the whole weight; weight_scale
    is then that of the whole. SourceError when the shapes do not fit or a value is NaN.
    """
    import numpy as np

    values = e4m3_values()[as_bytes_array(weight)]
    if not np.isfinite(values).all():
        raise SourceError("float-quantized weights hold a NaN")
    scale = as_floats(weight_scale)
    if block is None:
        return _scaled(values, scale)
    rows, columns = values.shape
    row, column = (first_row + np.arange(rows)) // block[0], np.arange(columns) // block[1]
    if scale.ndim != 2 or (rows and row[-1] >= scale.shape[0]) or scale.shape[1] != -(-columns // block[1]):
        raise SourceError(
            f"scales {list(scale.shape)} do not fit rows {first_row} to {first_row + rows} of {columns} columns in "
            f"blocks of {block[0]} x {block[1]}"
        )
    return values * scale[row][:, column]


def _scaled(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`values` [rows, columns] times `scale` [rows, groups], [rows, 1] or one value; in place."""
    rows, columns = values.shape
    groups = max(1, scale.size // max(1, rows)) if scale.size > 1 else 1
    if scale.size not in (1, rows * groups) or columns % groups:
        raise SourceError(f"scales {list(scale.shape)} do not fit weights {rows} x {columns}")
    grouped = values.reshape(rows, groups, -1)
    grouped *= scale.reshape(-1, groups, 1) if scale.size > 1 else scale.reshape(1, 1, 1)
    return values
