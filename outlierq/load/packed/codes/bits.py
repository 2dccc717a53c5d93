"""compressed-tensors `pack-quantized`, unpacked with numpy and bit arithmetic alone.

The decoders verify what an exporter wrote, so they share no code with any packer. Layout (compressed-tensors 0.19 and
later): the codes of one row lie densely in little-endian 32-bit words, code i at bits [i * bits, (i + 1) * bits),
lowest bit first, straddling words where it must. Stored codes are unsigned: signed codes plus 2^(bits - 1). Zero points
are packed in the same way, but along the output rows (dimension 0).
"""

from __future__ import annotations

from functools import partial
from math import gcd
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Numbers, Parts, as_array, as_floats
from outlierq.load.packed.reading import reads_rows

if TYPE_CHECKING:
    import numpy as np

# Values decoded at a time, so that what is in between stays in the cache and small beside the result.
VALUES_PER_RUN = 1 << 18


@reads_rows("compressed-tensors", "weight_packed", "weight_scale", "weight_shape")
def pack_quantized_rows(
    stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int
) -> QuantTensor:
    """Output rows [start, stop) of a linear of `shape` (out, in). start: a multiple of 32, for the zero points.

    stored: as in `decode_pack_quantized`, and weight_shape [2]. SourceError when the tensors do not fit.
    """
    import torch

    said = tuple(stored["weight_shape"].tolist())
    if said != shape:
        raise SourceError(f"weight_shape says {said} for a linear of {shape}")
    rows, columns, bits = stop - start, shape[1], scheme.bits
    scale = stored["weight_scale"][start:stop]
    codes = unpack(_checked_words(stored["weight_packed"][start:stop], rows, columns, bits), bits, columns)
    zero_point = None
    if scheme.symmetric:
        codes = (codes - codes.dtype.type(1 << (bits - 1))).view("i1")  # wraps below 0, as two's complement does
    else:
        words = stored["weight_zero_point"][start * bits // 32 : -(-stop * bits // 32)]
        zero = decode_zero_points(words, (rows, columns), bits, scale.shape[1])
        zero_point = torch.from_numpy(zero).to(torch.uint8)
    return QuantTensor(torch.from_numpy(codes), scale, zero_point, scheme)


def decode_pack_quantized(
    weight_packed: Numbers,
    weight_scale: Numbers,
    weight_zero_point: Numbers | None,
    shape: tuple[int, int],
    bits: int,
    *,
    group_size: int | None = None,
    group_index: Numbers | None = None,
) -> np.ndarray:
    """Float32 [out, in]: `(code - zero_point) * scale`, each group with its own scale.

    weight_packed: [out, ceil(in * bits / 32)] int32. weight_scale: [out, groups], [out, 1] per channel, or one value.
    weight_zero_point: [ceil(out * bits / 32), groups] int32, None when symmetric. shape: (out, in). group_size: columns
    of a group, needed only when the last group is narrower. group_index: [in], group of each column (activation order).
    Torch tensors and arrays are taken alike. SourceError when the shapes do not fit.
    """
    import numpy as np

    rows, columns = shape
    packed = _checked_words(weight_packed, rows, columns, bits)
    scale = as_floats(weight_scale)
    if scale.size != 1 and (rows < 1 or scale.size % rows):
        raise SourceError(f"scales {list(scale.shape)} do not fit weights {rows} x {columns}")
    scale = np.broadcast_to(scale.reshape(rows if scale.size > 1 else 1, -1), (rows, max(1, scale.size // rows)))
    groups = scale.shape[1]
    if group_index is None and columns % groups == 0 and group_size in (None, columns // groups):
        spread = _spread_evenly
    else:
        columns_of = _group_of_columns(columns, groups, group_size, group_index)
        spread = partial(_spread_by_index, columns_of)
    if weight_zero_point is None:
        zero = np.full((rows, groups), 1 << (bits - 1), np.float32)
    else:
        zero = decode_zero_points(weight_zero_point, shape, bits, groups).astype(np.float32)
    weight = np.empty((rows, columns), np.float32)
    run = max(1, VALUES_PER_RUN // max(1, columns))
    for first in range(0, rows, run):
        part = slice(first, first + run)
        weight[part] = unpack(packed[part], bits, columns)
        spread(weight[part], zero[part], np.subtract)
        spread(weight[part], scale[part], np.multiply)
    return weight


def decode_codes(weight_packed: Numbers, shape: tuple[int, int], bits: int, *, symmetric: bool = True) -> np.ndarray:
    """Int16 [out, in] codes: symmetric ones are signed, from -2^(bits-1); others unsigned, from 0 to 2^bits - 1."""
    import numpy as np

    rows, columns = shape
    codes = unpack(_checked_words(weight_packed, rows, columns, bits), bits, columns).astype(np.int16)
    return codes - (1 << (bits - 1)) if symmetric else codes


def decode_zero_points(weight_zero_point: Numbers, shape: tuple[int, int], bits: int, groups: int) -> np.ndarray:
    """Int16 [out, groups] unsigned zero points, on the scale of the unsigned codes."""
    import numpy as np

    rows = shape[0]
    packed = _checked_words(as_array(weight_zero_point).T, groups, rows, bits)
    return unpack(packed, bits, rows).T.astype(np.int16)


def unpack(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Uint8 [rows, columns] from int32 [rows, words]: code i at bits i * bits and up, lowest first, as in GPTQ, too.

    `slots` codes fill exactly `width` bytes, so the slots repeat.
    """
    import numpy as np

    stored = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return stored[:, :columns]
    slots, width = 8 // gcd(8, bits), bits // gcd(8, bits)
    runs = -(-columns // slots)
    raw = stored[:, : runs * width]
    if raw.shape[1] < runs * width:
        raw = np.pad(raw, ((0, 0), (0, runs * width - raw.shape[1])))
    codes = np.empty((words.shape[0], runs * slots), np.uint8)
    for slot in range(slots):
        byte, shift = divmod(slot * bits, 8)
        value = raw[:, byte::width] >> shift
        if shift + bits > 8:
            value |= raw[:, byte + 1 :: width] << (8 - shift)
        codes[:, slot::slots] = value & ((1 << bits) - 1)
    return codes[:, :columns]


def _checked_words(packed: Numbers, rows: int, columns: int, bits: int) -> np.ndarray:
    """The packed words as int32, refused when their number is not that of the shape."""
    import numpy as np

    words = as_array(packed)
    if not 2 <= bits <= 8:
        raise SourceError(f"weights of {bits} bits cannot be decoded (2 to 8 can)")
    expected = (rows, -(-columns * bits // 32))
    if words.dtype != np.int32 or words.shape != expected:
        raise SourceError(
            f"{rows} x {columns} codes of {bits} bits need int32 words {list(expected)}, "
            f"found {words.dtype} {list(words.shape)}"
        )
    return words


def _spread_evenly(weight: np.ndarray, per_group: np.ndarray, operation: np.ufunc) -> None:
    """Apply one value per group in place; groups of equal width are a view."""
    grouped = weight.reshape(*per_group.shape, -1)
    operation(grouped, per_group[..., None], out=grouped)


def _spread_by_index(columns_of: np.ndarray, weight: np.ndarray, per_group: np.ndarray, operation: np.ufunc) -> None:
    """Apply one value per group in place; columns_of: [in] group of each column."""
    operation(weight, per_group[:, columns_of], out=weight)


def _group_of_columns(columns: int, groups: int, group_size: int | None, group_index: Numbers | None) -> np.ndarray:
    """[in] group of each column."""
    import numpy as np

    index = as_array(group_index) if group_index is not None else None
    if index is None:
        index = np.arange(columns) // (group_size or -(-columns // groups))
    if index.shape != (columns,) or index.min() < 0 or index.max() != groups - 1:
        raise SourceError(f"{groups} groups of {group_size or 'equal'} columns do not divide {columns} columns")
    return index
