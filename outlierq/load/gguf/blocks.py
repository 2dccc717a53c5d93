"""Reads the blocks of a GGUF file back into codes and scales, with numpy alone; shares no code with the exporter.

A block stands for 32 neighbouring columns: Q4_0 [f16 d, 16 bytes], Q4_1 [f16 d, f16 m, 16 bytes], Q8_0 [f16 d, 32
int8], MXFP4 [u8 exponent, 16 bytes]. Byte j of the 16 holds column j in its low and column j + 16 in its high half. A
superblock of Q4_K stands for 256 columns, see `_superblock_rows`.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.model import TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.gguf.file import read_gguf_header
from outlierq.load.packed.codes.numbers import Parts, as_array, e4m3_of_e2m1
from outlierq.load.packed.reading import reads_headers, reads_rows
from outlierq.load.source.shards import StoredTensor

if TYPE_CHECKING:
    import numpy as np

# Columns of a block and its bytes, by kind, bits, symmetry and scales.
WIDTHS = {
    ("int", 4, True, "plain"): (32, 18),
    ("int", 4, False, "plain"): (32, 20),
    ("int", 8, True, "plain"): (32, 34),
    ("float", 4, True, "power-of-two"): (32, 17),
    ("int", 4, False, "two-level"): (256, 144),
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
    columns, width = WIDTHS.get((scheme.kind, scheme.bits, scheme.symmetric, scheme.scales), (1, 0))
    if raw.shape != (shape[0], shape[1] // columns * width) or not width:
        raise SourceError(f"{list(raw.shape)} bytes are not {scheme} of {shape[0]} x {shape[1]} in blocks of {columns}")
    blocks = np.ascontiguousarray(raw[rows]).reshape(stop - start, -1, width)
    if columns == 256:
        return _superblock_rows(blocks, scheme)
    if scheme.kind == "float":
        return _mxfp4_rows(blocks, scheme)
    scale = _halves(blocks[..., :2])
    if scheme.bits == 8:
        codes = blocks[..., 2:].view(np.int8).reshape(stop - start, -1)
    else:
        packed = blocks[..., width - 16 :]
        codes = np.concatenate([packed & 15, packed >> 4], -1).reshape(stop - start, -1)
    zero = None
    if not scheme.symmetric:
        zero = _zero_points(scale, _halves(blocks[..., 2:4]))
        zero = torch.from_numpy(_per_group(zero, scheme, shape[1]))
    elif scheme.bits == 4:
        codes = (codes - np.uint8(8)).view(np.int8)
    scale = torch.from_numpy(_per_group(scale, scheme, shape[1]))
    return QuantTensor(torch.from_numpy(np.ascontiguousarray(codes)), scale, zero, scheme)


def _mxfp4_rows(blocks: np.ndarray, scheme: QuantScheme) -> QuantTensor:
    """Blocks [rows, blocks, 17] of MXFP4; halves of bytes are E2M1 numbers."""
    import numpy as np
    import torch

    packed = blocks[..., 1:]
    codes = e4m3_of_e2m1()[np.concatenate([packed & 15, packed >> 4], -1)].reshape(len(blocks), -1)
    scale = torch.from_numpy(np.ascontiguousarray(blocks[..., 0]))
    return QuantTensor(torch.from_numpy(codes).view(torch.float8_e4m3fn), scale, None, scheme)


def _superblock_rows(blocks: np.ndarray, scheme: QuantScheme) -> QuantTensor:
    """Superblocks [rows, superblocks, 144] of Q4_K: f16 units of scales and minima, 12 bytes of those, 128 of codes.

    Scale and minimum of group j < 4 are the low 6 bits of bytes j and j + 4 of the 12. Those of j >= 4 have their low 4
    bits in the halves of byte j + 4, their upper 2 in the upper 2 of bytes j - 4 and j. 32 bytes of codes hold 64
    columns, the first 32 in the low halves.
    """
    import numpy as np
    import torch

    rows = len(blocks)
    units = np.ascontiguousarray(blocks[..., :4]).view("<f2")
    packed = blocks[..., 4:16]
    scale, minimum = (np.empty((*packed.shape[:2], 8), np.uint8) for _ in range(2))
    for group in range(8):
        if group < 4:
            scale[..., group], minimum[..., group] = packed[..., group] & 63, packed[..., group + 4] & 63
        else:
            low = packed[..., group + 4]
            scale[..., group] = (low & 15) + (packed[..., group - 4] >> 6) * 16
            minimum[..., group] = (low >> 4) + (packed[..., group] >> 6) * 16
    halves = blocks[..., 16:].reshape(rows, -1, 4, 32)
    codes = np.stack([halves & 15, halves >> 4], 3).reshape(rows, -1)
    codes, scale, minimum = (torch.from_numpy(part.reshape(rows, -1)) for part in (codes, scale, minimum))
    return QuantTensor(codes, scale, minimum, scheme, super_scale=torch.from_numpy(units))


def file_rows(rows: np.ndarray, count: int, heads: int) -> np.ndarray:
    """Where the file has the model's rows: of a head with h rows, row i lies at 2 * i, row h / 2 + i at 2 * i + 1.

    rows: [n] numbers of rows, of `count` in all.
    """
    size = count // heads
    head, place = rows // size, rows % size
    half, pair = place // (size // 2), place % (size // 2)
    return head * size + 2 * pair + half


def _halves(raw: np.ndarray) -> np.ndarray:
    """Float16 numbers of their two bytes."""
    import numpy as np

    return np.ascontiguousarray(raw).view("<f2")[..., 0]


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
    if not (grouped == grouped[..., :1]).all():
        raise SourceError(f"blocks of one group have several scales ({scheme})")
    return np.ascontiguousarray(grouped[..., 0])
