"""An independent decoder for compressed-tensors `pack-quantized` weights, with numpy and bit arithmetic alone.

It verifies what an exporter wrote, so it shares no code with any packer. Layout (compressed-tensors 0.19 and later):
the codes of one row lie densely in little-endian 32-bit words, code i at bits [i * bits, (i + 1) * bits), lowest bit
first, straddling words where it must. Stored codes are unsigned: signed codes plus 2^(bits - 1). Zero points are packed
in the same way, but along the output rows (dimension 0).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError

if TYPE_CHECKING:
    import numpy as np

# Values decoded at a time, so that what is in between stays in the cache and small beside the result.
VALUES_PER_RUN = 1 << 18


def decode_pack_quantized(
    weight_packed: Any,
    weight_scale: Any,
    weight_zero_point: Any | None,
    shape: tuple[int, int],
    bits: int,
    *,
    group_size: int | None = None,
    group_index: Any | None = None,
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
    scale = _floats(weight_scale)
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
        weight[part] = _unpack(packed[part], bits, columns)
        spread(weight[part], zero[part], np.subtract)
        spread(weight[part], scale[part], np.multiply)
    return weight


def _spread_evenly(weight: np.ndarray, per_group: np.ndarray, operation: Any) -> None:
    """Apply one value per group in place; groups of equal width are a view."""
    grouped = weight.reshape(*per_group.shape, -1)
    operation(grouped, per_group[..., None], out=grouped)


def _spread_by_index(columns_of: np.ndarray, weight: np.ndarray, per_group: np.ndarray, operation: Any) -> None:
    """Apply one value per group in place; columns_of: [in] group of each column."""
    operation(weight, per_group[:, columns_of], out=weight)


def decode_codes(weight_packed: Any, shape: tuple[int, int], bits: int, *, symmetric: bool = True) -> np.ndarray:
    """Int16 [out, in] codes: symmetric ones are signed, from -2^(bits-1); others unsigned, from 0 to 2^bits - 1."""
    import numpy as np

    rows, columns = shape
    codes = _unpack(_checked_words(weight_packed, rows, columns, bits), bits, columns).astype(np.int16)
    return codes - (1 << (bits - 1)) if symmetric else codes


def decode_zero_points(weight_zero_point: Any, shape: tuple[int, int], bits: int, groups: int) -> np.ndarray:
    """Int16 [out, groups] unsigned zero points, on the scale of the unsigned codes."""
    import numpy as np

    rows = shape[0]
    packed = _checked_words(_array(weight_zero_point).T, groups, rows, bits)
    return _unpack(packed, bits, rows).T.astype(np.int16)


def _unpack(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Uint8 [rows, columns] from int32 [rows, words]. Eight codes fill exactly `bits` bytes, so eight slots repeat."""
    import numpy as np

    stored = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    runs = -(-columns // 8)
    raw = np.zeros((words.shape[0], runs * bits), np.uint8)
    known = min(raw.shape[1], stored.shape[1])
    raw[:, :known] = stored[:, :known]
    codes = np.empty((words.shape[0], runs * 8), np.uint8)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        value = raw[:, byte::bits] >> shift
        if shift + bits > 8:
            value |= raw[:, byte + 1 :: bits] << (8 - shift)
        codes[:, slot::8] = value & ((1 << bits) - 1)
    return codes[:, :columns]


def _checked_words(packed: Any, rows: int, columns: int, bits: int) -> np.ndarray:
    """The packed words as int32, refused when their number is not that of the shape."""
    import numpy as np

    words = _array(packed)
    if not 2 <= bits <= 8:
        raise SourceError(f"weights of {bits} bits cannot be decoded (2 to 8 can)")
    expected = (rows, -(-columns * bits // 32))
    if words.dtype != np.int32 or words.shape != expected:
        raise SourceError(
            f"{rows} x {columns} codes of {bits} bits need int32 words {list(expected)}, "
            f"found {words.dtype} {list(words.shape)}"
        )
    return words


def _group_of_columns(columns: int, groups: int, group_size: int | None, group_index: Any | None) -> np.ndarray:
    """[in] group of each column."""
    import numpy as np

    index = _array(group_index) if group_index is not None else None
    if index is None:
        index = np.arange(columns) // (group_size or -(-columns // groups))
    if index.shape != (columns,) or index.min() < 0 or index.max() != groups - 1:
        raise SourceError(f"{groups} groups of {group_size or 'equal'} columns do not divide {columns} columns")
    return index


def _array(value: Any) -> np.ndarray:
    """A torch tensor or an array, as an array."""
    import numpy as np

    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _floats(value: Any) -> np.ndarray:
    """Scales as float32; numpy knows no bfloat16, so torch widens it."""
    import numpy as np

    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value, np.float32)
