"""Reads the blocks of a GGUF file back into codes and scales, with numpy alone; shares no code with the exporter.

A block stands for 32 neighbouring columns: Q4_0 [f16 d, 16 bytes], Q4_1 [f16 d, f16 m, 16 bytes], Q8_0 [f16 d, 32
int8], MXFP4 [u8 exponent, 16 bytes]. Byte j of the 16 holds column j in its low and column j + 16 in its high half.
All other types are read in `superblocks.py`.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.gguf.types import block_types
from outlierq.core.model import TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.gguf.file import read_gguf_header
from outlierq.load.gguf.superblocks import SINGLE, SUPERBLOCKS, halves, of_blocks, of_superblocks, spread
from outlierq.load.packed.codes.numbers import Parts, as_array, e2m1_values, e4m3_of
from outlierq.load.packed.reading import reads_headers, reads_rows
from outlierq.load.source.shards import StoredTensor

if TYPE_CHECKING:
    import numpy as np

# Types of schemes that name none, by kind, bits, symmetry and scales.
TYPES = {
    ("int", 4, True, "plain"): "Q4_0",
    ("int", 4, False, "plain"): "Q4_1",
    ("int", 8, True, "plain"): "Q8_0",
    ("float", 4, True, "power-of-two"): "MXFP4",
    ("int", 4, False, "two-level"): "Q4_K",
    ("float", 4, True, "two-level"): "NVFP4",
}
PLAIN = ("F32", "F16", "BF16")


@reads_headers("gguf")
def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file as the bytes that lie there: packed ones as U8 [rows, bytes of a row], several matrices
    as one of all their rows.
    """
    tensors = {}
    for tensor in read_gguf_header(path).tensors.values():
        dtype, shape = tensor.type, tensor.shape
        if dtype not in PLAIN:
            width = tensor.row_bytes or tensor.nbytes
            dtype, shape = "U8", (tensor.nbytes // width if width else 0, width)
        elif len(shape) > 2:
            shape = (prod(shape[:-1]), shape[-1])
        tensors[tensor.name] = StoredTensor(TensorInfo(tensor.name, dtype, shape, tensor.nbytes), path, tensor.start)
    return tensors


@reads_rows("gguf", "weight", "heads")
def gguf_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Rows [start, stop) of the model. stored: "weight", bytes [out, bytes of a row], and "heads", the number of heads
    over which the file has the rows in ggml's rotary order, 0 for none. SourceError when bytes and scheme disagree.
    """
    import numpy as np
    import torch

    raw = as_array(stored["weight"])
    heads = int(stored["heads"])
    rows = file_rows(np.arange(start, stop), shape[0], heads) if heads else slice(start, stop)
    name = scheme.type or TYPES.get((scheme.kind, scheme.bits, scheme.symmetric, scheme.scales))
    kind = block_types().get(str(name))
    whole = len(raw) == shape[0] or (not heads and stop <= len(raw))  # some rows are enough where they are in order
    if kind is None or not whole or raw.shape[1:] != (shape[1] // kind.columns * kind.nbytes,):
        raise SourceError(
            f"{list(raw.shape)} bytes are not {scheme} of {shape[0]} x {shape[1]}"
            + ("" if kind is None else f" in blocks of {kind.columns}")
        )
    width = kind.nbytes
    blocks = np.ascontiguousarray(raw[rows]).reshape(stop - start, -1, width)
    if kind.name in SUPERBLOCKS:
        return of_superblocks(SUPERBLOCKS[kind.name](blocks), scheme)
    if kind.name in SINGLE:
        return of_blocks(SINGLE[kind.name](blocks), scheme)
    if scheme.kind == "float":
        return _mxfp4_rows(blocks, scheme)
    scale = halves(blocks[..., :2])[..., 0]
    if scheme.bits == 8:
        codes = np.ascontiguousarray(blocks[..., 2:].view("V32")).view(np.int8).reshape(stop - start, -1)
    else:
        packed = blocks[..., width - 16 :]
        codes = spread(packed, 4, 16).reshape(stop - start, -1)
    zero = None
    if scheme.scales == "minimum":
        return of_blocks((codes, scale, halves(blocks[..., 2:4])[..., 0]), scheme)
    if not scheme.symmetric:
        zero = _zero_points(scale, halves(blocks[..., 2:4])[..., 0])
        zero = torch.from_numpy(_per_group(zero, scheme, shape[1]))
    elif scheme.bits == 4:
        codes -= np.uint8(8)
        codes = codes.view(np.int8)
    scale = torch.from_numpy(_per_group(scale, scheme, shape[1]))
    return QuantTensor(torch.from_numpy(np.ascontiguousarray(codes)), scale, zero, scheme)


@reads_rows("gguf", "weight", "scale", "heads")
def nvfp4_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """The same of NVFP4: blocks [4 E4M3 scales, 32 bytes of 64 columns], and "scale", by which all is multiplied.

    Of 16 columns, byte j of 8 holds column j in its low and column j + 8 in its high half.
    """
    import numpy as np
    import torch

    raw, heads, (rows, columns) = as_array(stored["weight"]), int(stored["heads"]), shape
    if raw.shape != (rows, columns // 64 * 36) or scheme.kind != "float":
        raise SourceError(f"{list(raw.shape)} bytes are not {scheme} of {rows} x {columns} in blocks of 64")
    order = file_rows(np.arange(start, stop), rows, heads) if heads else slice(start, stop)
    blocks = np.ascontiguousarray(raw[order]).reshape(stop - start, -1, 36)
    codes = e4m3_of(e2m1_values())[spread(blocks[..., 4:], 4, 8)].reshape(stop - start, -1)
    scale = torch.from_numpy(np.ascontiguousarray(blocks[..., :4]).reshape(stop - start, -1))
    unit = 1 / torch.as_tensor(stored["scale"]).float().reshape(1)
    return QuantTensor(
        torch.from_numpy(codes).view(torch.float8_e4m3fn),
        scale.view(torch.float8_e4m3fn),
        None,
        scheme,
        super_scale=unit,
    )


def _mxfp4_rows(blocks: np.ndarray, scheme: QuantScheme) -> QuantTensor:
    """Blocks [rows, blocks, 17] of MXFP4; halves of bytes are E2M1 numbers."""
    import numpy as np
    import torch

    packed = blocks[..., 1:]
    codes = e4m3_of(e2m1_values())[np.concatenate([packed & 15, packed >> 4], -1)].reshape(len(blocks), -1)
    scale = torch.from_numpy(np.ascontiguousarray(blocks[..., 0]))
    return QuantTensor(torch.from_numpy(codes).view(torch.float8_e4m3fn), scale, None, scheme)


def file_rows(rows: np.ndarray, count: int, heads: int) -> np.ndarray:
    """Where the file has the model's rows: of a head with h rows, row i lies at 2 * i, row h / 2 + i at 2 * i + 1.

    rows: [n] numbers of rows, of `count` in all.
    """
    size = count // heads
    head, place = rows // size, rows % size
    half, pair = place // (size // 2), place % (size // 2)
    return head * size + 2 * pair + half


def _zero_points(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Uint8 zero points of the stored minima; SourceError when one is not the nearest float16 to -zero * scale."""
    import numpy as np

    wide = scale.astype(np.float32)
    zero = np.rint(-low.astype(np.float32) / wide)
    if not np.array_equal((-zero * wide).astype(np.float16) + np.float16(0), low + np.float16(0)):
        raise SourceError("a block of Q4_1 has a minimum that is no multiple of its scale")
    return zero.astype(np.uint8)


def _per_group(values: np.ndarray, scheme: QuantScheme, columns: int) -> np.ndarray:
    """One value per group from one per block of 32; SourceError when the blocks of a group differ."""
    import numpy as np

    grouped = values.reshape(len(values), scheme.groups(columns), -1)
    if grouped.shape[-1] == 1:
        return values
    if not (grouped == grouped[..., :1]).all():
        raise SourceError(f"blocks of one group have several scales ({scheme})")
    return np.ascontiguousarray(grouped[..., 0])
