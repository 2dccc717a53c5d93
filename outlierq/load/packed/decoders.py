"""Independent decoders for the compressed-tensors formats, with numpy and bit arithmetic alone.

They verify what an exporter wrote, so they share no code with any packer. `int-quantized` and `float-quantized` store
one byte per code. Layout of `pack-quantized` (compressed-tensors 0.19 and later): the codes of one row lie densely in
little-endian 32-bit words, code i at bits [i * bits, (i + 1) * bits), lowest bit first, straddling words where it must.
Stored codes are unsigned: signed codes plus 2^(bits - 1). Zero points are packed in the same way, but along the output
rows (dimension 0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import gcd
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme

if TYPE_CHECKING:
    import numpy as np
    import torch

# The tensors of one stored linear, by the last part of their names ("weight_packed", "weight_scale", ...).
Stored = Mapping[str, "torch.Tensor"]

# Values decoded at a time, so that what is in between stays in the cache and small beside the result.
VALUES_PER_RUN = 1 << 18


def decode_rows(
    stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int, *, form: str = ""
) -> QuantTensor | torch.Tensor:
    """Output rows [start, stop) of a linear as it lies on disk, for comparison with what was meant.

    A decoder in `ROW_DECODERS` gives a `QuantTensor` where codes and scales can be told from the stored tensors (then
    each of them must be the one meant, bit for bit), or the dense rows in the dtype they are stored in.
    Weights are [out, in] here, also where the file holds [in, out]. shape: (out, in). start: a multiple of 32 (zero
    points are packed along rows) and of a block's height. form: name of the format, for those whose tensors do not
    tell it (GPTQ's versions). SourceError when the tensors do not fit.
    """
    if form == "gptq-v2":
        return _gptq_rows(stored, scheme, shape, start, stop, version=2)
    for roles, decoder in ROW_DECODERS:
        if roles <= stored.keys():
            return decoder(stored, scheme, shape, start, stop)
    raise SourceError(f"no decoder is known for a linear stored as {', '.join(sorted(stored))}")


def _pack_quantized_rows(
    stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int
) -> QuantTensor:
    """compressed-tensors `pack-quantized`."""
    import torch

    said = tuple(stored["weight_shape"].tolist())
    if said != shape:
        raise SourceError(f"weight_shape says {said} for a linear of {shape}")
    rows, columns, bits = stop - start, shape[1], scheme.bits
    scale = stored["weight_scale"][start:stop]
    codes = _unpack(_checked_words(stored["weight_packed"][start:stop], rows, columns, bits), bits, columns)
    zero_point = None
    if scheme.symmetric:
        codes = (codes - codes.dtype.type(1 << (bits - 1))).view("i1")  # wraps below 0, as two's complement does
    else:
        words = stored["weight_zero_point"][start * bits // 32 : -(-stop * bits // 32)]
        zero = decode_zero_points(words, (rows, columns), bits, scale.shape[1])
        zero_point = torch.from_numpy(zero).to(torch.uint8)
    return QuantTensor(torch.from_numpy(codes), scale, zero_point, scheme)


def _gptq_rows(
    stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int, version: int = 1
) -> QuantTensor:
    """GPTQ, by default version 1."""
    from outlierq.load.packed.gptq import gptq_rows

    return gptq_rows(stored, scheme, shape, start, stop, version=version)


def _awq_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """AutoAWQ's GEMM layout."""
    from outlierq.load.packed.awq import awq_rows

    return awq_rows(stored, scheme, shape, start, stop)


def _e2m1_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized`."""
    from outlierq.load.packed.e2m1 import e2m1_rows

    return e2m1_rows(stored, scheme, shape, start, stop)


def _gguf_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """The blocks of a GGUF file."""
    from outlierq.load.gguf.blocks import gguf_rows

    return gguf_rows(stored, scheme, shape, start, stop)


def _llm_int8_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """LLM.int8() as bitsandbytes stores it."""
    import torch

    from outlierq.load.packed.bitsandbytes import decode_int8

    return torch.from_numpy(decode_int8(stored["weight"][start:stop], stored["SCB"][start:stop]))


def _split_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """`outlierq-split`: int8 codes, and outlier columns in 16 bits."""
    import torch

    from outlierq.load.packed.outlier_split import decode_split

    by_row = {name: stored[name][start:stop] for name in ("weight", "weight_scale", "outlier_weight")}
    return torch.from_numpy(decode_split(outlier_columns=stored["outlier_columns"], **by_row))


def _byte_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """compressed-tensors `int-quantized` and `float-quantized`: one byte per code."""
    import torch

    codes, scale = stored["weight"][start:stop], stored["weight_scale"]
    if scheme.kind == "int":
        return torch.from_numpy(decode_int_quantized(codes, scale[start:stop]))
    if scheme.block is None:
        return torch.from_numpy(decode_float_quantized(codes, scale[start:stop]))
    return torch.from_numpy(decode_float_quantized(codes, scale, block=scheme.block, first_row=start))


def _dense_rows(stored: Stored, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """A plain weight."""
    return stored["weight"][start:stop]


RowDecoder = Callable[[Stored, QuantScheme, tuple[int, int], int, int], "QuantTensor | torch.Tensor"]

# By the tensors that a format cannot do without; the first that fits is taken, so the most particular comes first.
ROW_DECODERS: tuple[tuple[frozenset[str], RowDecoder], ...] = (
    (frozenset({"weight_packed", "weight_scale", "weight_shape"}), _pack_quantized_rows),
    (frozenset({"weight_packed", "weight_scale"}), _e2m1_rows),
    (frozenset({"qweight", "qzeros", "scales", "g_idx"}), _gptq_rows),
    (frozenset({"qweight", "qzeros", "scales"}), _awq_rows),
    (frozenset({"weight", "heads"}), _gguf_rows),
    (frozenset({"weight", "SCB"}), _llm_int8_rows),
    (frozenset({"weight", "weight_scale", "outlier_columns", "outlier_weight"}), _split_rows),
    (frozenset({"weight", "weight_scale"}), _byte_rows),
    (frozenset({"weight"}), _dense_rows),
)


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
        weight[part] = _unpack(packed[part], bits, columns)
        spread(weight[part], zero[part], np.subtract)
        spread(weight[part], scale[part], np.multiply)
    return weight


def decode_int_quantized(weight: Any, weight_scale: Any) -> np.ndarray:
    """Float32 [out, in] of `int-quantized`: code * scale. weight: [out, in] int8. weight_scale: [out, groups].

    SourceError when the groups do not divide the columns.
    """
    import numpy as np

    codes = _array(weight)
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise SourceError(f"int-quantized codes are a matrix of int8, found {codes.dtype} {list(codes.shape)}")
    return _scaled(codes.astype(np.float32), _floats(weight_scale))


def decode_float_quantized(
    weight: Any, weight_scale: Any, *, block: tuple[int, int] | None = None, first_row: int = 0
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
    scale = _floats(weight_scale)
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


def e4m3_values() -> np.ndarray:
    """Float32 [256], the number that each byte stands for in E4M3 (arXiv:2209.05433, section 3).

    Sign bit, 4 bits of exponent with bias 7, 3 of mantissa: (-1)^s * 2^(e - 7) * (1 + m / 8), subnormal where e is 0,
    no infinities, NaN where all other bits are 1.
    """
    import numpy as np

    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    values = np.where(byte >> 7 == 1, -size, size)
    values[byte & 127 == 127] = np.nan
    return values.astype(np.float32)


def as_bytes_array(weight: Any) -> np.ndarray:
    """Numbers of one byte as their bytes; numpy knows no float8, so torch views them."""
    import numpy as np

    if hasattr(weight, "detach"):
        import torch

        if weight.element_size() != 1:
            raise SourceError(f"float8 numbers are bytes, found {weight.dtype}")
        weight = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.asarray(weight, np.uint8)


def _scaled(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`values` [rows, columns] times `scale` [rows, groups], [rows, 1] or one value; in place."""
    rows, columns = values.shape
    groups = max(1, scale.size // max(1, rows)) if scale.size > 1 else 1
    if scale.size not in (1, rows * groups) or columns % groups:
        raise SourceError(f"scales {list(scale.shape)} do not fit weights {rows} x {columns}")
    grouped = values.reshape(rows, groups, -1)
    grouped *= scale.reshape(-1, groups, 1) if scale.size > 1 else scale.reshape(1, 1, 1)
    return values


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
    """Uint8 [rows, columns] from int32 [rows, words]. `slots` codes fill exactly `width` bytes, so the slots repeat."""
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
