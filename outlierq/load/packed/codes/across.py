"""compressed-tensors with matrices as a Conv1D (GPT-2) stores them, [in, out]: a column has scales, not a row.

The decoders verify what an exporter wrote, so they share no code with any packer. Integers are packed along the rows of
what is stored, that is along outputs. A group of inputs is a block of rows in one column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.bits import decode_codes
from outlierq.load.packed.codes.numbers import Parts, as_bytes_array, as_floats, e4m3_values
from outlierq.load.packed.reading import reads_rows

if TYPE_CHECKING:
    import numpy as np
    import torch


@reads_rows("compressed-tensors", "weight_packed", "weight_scale", "weight_shape", "transposed")
def packed_rows_across(
    stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int
) -> QuantTensor:
    """Output rows [start, stop) of a linear of `shape` (out, in), which are columns of what is stored.

    stored: weight_packed int32 [in, words], weight_scale [groups, out], weight_shape [2]. SourceError when they do not
    fit.
    """
    import numpy as np
    import torch

    said = tuple(stored["weight_shape"].tolist())
    if said != shape[::-1]:
        raise SourceError(f"weight_shape says {said} for a linear of {shape} that is stored as [in, out]")
    codes = decode_codes(stored["weight_packed"], said, scheme.bits).astype(np.int8)
    return QuantTensor(torch.from_numpy(codes).T[start:stop].contiguous(), _scales(stored, start, stop), None, scheme)


@reads_rows("compressed-tensors", "weight", "weight_scale", "transposed")
def byte_rows_across(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """The same of codes of one byte. stored: weight, here [out, in] already, and weight_scale [groups, out]."""
    if tuple(stored["weight"].shape) != shape:
        raise SourceError(f"codes {list(stored['weight'].shape)} are not those of a linear of {shape}")
    return QuantTensor(stored["weight"][start:stop], _scales(stored, start, stop), None, scheme)


def _scales(stored: Parts, start: int, stop: int) -> torch.Tensor:
    """Those of some output rows, [rows, groups]."""
    return stored["weight_scale"].T[start:stop].contiguous()


def decode_across(parts: Parts, shape: tuple[int, int], bits: int, height: int | None) -> np.ndarray:
    """Float32 [rows, columns] as stored: code * scale. height: rows that share a scale, None for all of a column.

    parts: weight_packed int32, or weight of int8 or E4M3; weight_scale [groups, columns]. SourceError when the shapes
    do not fit or a value is NaN.
    """
    import numpy as np

    rows, columns = shape
    scale = as_floats(parts["weight_scale"])
    if scale.shape != (-(-rows // (height or rows)), columns):
        raise SourceError(f"scales {list(scale.shape)} do not fit {rows} x {columns} weights stored as [in, out]")
    values = _values(parts, shape, bits)
    if values.shape != shape or not np.isfinite(values).all():
        raise SourceError(f"codes {list(values.shape)} are none of {rows} x {columns} weights, or hold a NaN")
    return values * np.repeat(scale, height or rows, axis=0)[:rows]


def _values(parts: Parts, shape: tuple[int, int], bits: int) -> np.ndarray:
    """Float32 [rows, columns] that the codes stand for."""
    import numpy as np

    if "weight_packed" in parts:
        return decode_codes(parts["weight_packed"], shape, bits).astype(np.float32)
    codes = as_bytes_array(parts["weight"])
    return e4m3_values()[codes] if parts["weight"].is_floating_point() else codes.view(np.int8).astype(np.float32)
