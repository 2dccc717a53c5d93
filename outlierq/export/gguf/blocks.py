"""The blocks of a GGUF file: from codes and scales to the bytes that llama.cpp reads, with numpy alone.

| our scheme | ggml type | a block | exact |
|---|---|---|---|
| int4 symmetric | Q4_0 | f16 d, 32 nibbles q: d * (q - 8) | yes |
| int4 asymmetric | Q4_1 | f16 d, f16 m, 32 nibbles q: d * q + m, m = -zero * d | up to the rounding of m to float16 |
| int8 symmetric | Q8_0 | f16 d, 32 int8 q: d * q | yes |
| int4 asymmetric, `scales: two-level` | Q4_K | see `_superblock` | yes |
| mxfp4 | MXFP4 | u8 e, 32 nibbles q: 2^(e - 127) * E2M1(q) | yes |
| nvfp4 | NVFP4 | 4 E4M3 s, 64 nibbles q: s * E2M1(q) / unit; 1 / unit is a tensor of its own | yes |
| `type: NAME` | NAME | see `data/gguf_types.json` and the function that packs it | yes |

A larger group is written as several blocks with the same scale. Layouts are those of llama.cpp's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from outlierq.core.gguf.types import BlockType, block_types
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.export.clients import byte_codes
from outlierq.ops.compiled import packing as native_packing
from outlierq.ops.packing import e2m1_codes, interleave, pack_halves

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK = 32
SUPERBLOCK = 256
NV_GROUP = 16
# Types of schemes that name none, by kind, bits, symmetry and scales.
TYPES = {
    ("int", 4, True, "plain"): "Q4_0",
    ("int", 4, False, "plain"): "Q4_1",
    ("int", 8, True, "plain"): "Q8_0",
    ("int", 4, False, "two-level"): "Q4_K",
    ("float", 4, True, "power-of-two"): "MXFP4",
    ("float", 4, True, "two-level"): "NVFP4",
}
# Those whose function of one pass is compiled.
COMPILED = tuple(kind for kind in TYPES.values() if kind in native_packing.GGUF_BLOCKS)
Parts = list["np.ndarray"]


def ggml_type(scheme: QuantScheme) -> str | None:
    """The type that holds a scheme, None when there is none."""
    if scheme.type is not None:
        return scheme.type
    kind = TYPES.get((scheme.kind, scheme.bits, scheme.symmetric, scheme.scales))
    groups_of = NV_GROUP if kind == "NVFP4" else BLOCK
    if scheme.activations is not None or (scheme.group_size is not None and scheme.group_size % groups_of):
        return None
    return None if kind == "NVFP4" and scheme.group_size != NV_GROUP else kind


def held_as(scheme: QuantScheme) -> BlockType:
    """The type of a scheme to which `GgufFormat.obstacle` has no objection."""
    kind = ggml_type(scheme)
    assert kind is not None, f"gguf does not hold {scheme}"
    return block_types()[kind]


def encode_blocks(site: LinearSite, quantized: QuantTensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Uint8 [out, bytes of a row]. order: int64, the model's row at each place; None: as they are."""
    import torch

    codes, kind = byte_codes(site, quantized), held_as(quantized.scheme)
    is_compiled = kind.name in COMPILED and quantized.scheme.scales != "minimum"
    blocks = native_packing.gguf_blocks(kind.name, quantized, order) if is_compiled else None
    if blocks is not None:
        return blocks
    parts = PACKED.get(kind.name, _block)(quantized, codes.cpu().contiguous().view(torch.uint8).numpy())
    blocks = torch.from_numpy(interleave(parts).reshape(len(codes), -1))
    return blocks if order is None else blocks[order]


def _block(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """The parts of all blocks of 32 columns, each [out, blocks, ...]."""
    rows, columns = quantized.shape
    kind, repeat = held_as(quantized.scheme).name, quantized.scheme.columns_per_group(columns) // BLOCK
    scale = quantized.scale.cpu().repeat_interleave(repeat, 1)[..., None]
    if kind == "Q8_0":
        return [scale.numpy(), codes.reshape(rows, -1, BLOCK)]
    parts = [scale.numpy()]
    if quantized.zero_point is not None:  # Q4_1
        parts.append(_minima(quantized, scale, repeat))
    codes = e2m1_codes(codes) if kind == "MXFP4" else codes
    flip = 8 if kind == "Q4_0" else 0  # signed codes are stored plus 8
    return [*parts, pack_halves(codes, BLOCK // 2, flip).reshape(rows, -1, BLOCK // 2)]


def _minima(quantized: QuantTensor, scale: torch.Tensor, repeat: int) -> np.ndarray:
    """Float16 [out, blocks, 1]: the smallest value of each block, which is that of code 0."""
    import torch

    assert quantized.zero_point is not None, "a block with a minimum has zero points"
    zero_point = quantized.zero_point.cpu().repeat_interleave(repeat, 1)[..., None]
    if quantized.scheme.scales == "minimum":
        return zero_point.numpy()
    return (-zero_point.float() * scale.float()).to(torch.float16).numpy()


def _five_bits(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """Q5_0 and Q5_1: f16 d, of Q5_1 f16 m, the fifth bits of 32 codes, then their lower four in halves of bytes."""
    rows = len(codes)
    codes = codes ^ 16 if quantized.scheme.symmetric else codes  # signed ones are stored plus 16
    scale = quantized.scale.cpu()[..., None]
    parts = [scale.numpy(), *([] if quantized.scheme.symmetric else [_minima(quantized, scale, 1)])]
    return [*parts, _fields(codes, 1, 1, 4).reshape(rows, -1, 4), _fields(codes, 4, 16).reshape(rows, -1, 16)]


def _superblock(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """Q4_K and Q5_K: f16 d and f16 m, 12 bytes of scales s and minima z, fifth bits of codes q, then their lower four.

    A weight is d * s * q - m * z. Scales and minima have 6 bits; bytes 0-3 and 4-7 hold those of groups 0 to 3, with
    the upper two bits of those of groups 4 to 7 above them, whose lower four bits are in bytes 8-11, minima in the high
    halves. Of the codes, 32 bytes hold a group in their low and the next in their high halves; bit g of byte c is the
    fifth bit of column c of group g.
    """
    import numpy as np

    shape = _shape(quantized)
    assert quantized.zero_point is not None, "minima that are missing"
    scale, minimum = (part.cpu().numpy().reshape(*shape, 2, 4) for part in (quantized.scale, quantized.zero_point))
    small = [
        scale[:, :, 0] | scale[:, :, 1] >> 4 << 6,
        minimum[:, :, 0] | minimum[:, :, 1] >> 4 << 6,
        scale[:, :, 1] & 15 | minimum[:, :, 1] << 4,
    ]
    fifth = [_fields(codes, 1, 32, 4).reshape(*shape, 32)] if quantized.scheme.bits == 5 else []
    return [_units(quantized), np.concatenate(small, -1), *fifth, _fields(codes, 4, 32).reshape(*shape, 128)]


def _q6_k(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """Q6_K: lower four bits of codes plus 32, upper two, 16 int8 scales, f16 d."""
    shape = _shape(quantized)
    codes = codes + 32
    low, high = _fields(codes, 4, 64).reshape(*shape, 128), _fields(codes, 2, 32, 4).reshape(*shape, 64)
    return [low, high, _small(quantized), _units(quantized)]


def _q3_k(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """Q3_K: third bits of codes plus 4, lower two, 16 scales plus 32 of 6 bits, f16 d.

    Scales 0 to 7 have their lower four bits in the low halves of 8 bytes, the others in the high ones; four more bytes
    hold the upper two bits, those of scale j in byte j mod 4.
    """
    import numpy as np

    shape = _shape(quantized)
    codes, scale = codes + 4, _small(quantized) + 32
    low = scale[..., :8] & 15 | scale[..., 8:] << 4
    high = (scale.reshape(*shape, 4, 4) >> 4 << _column(0, 2, 4, 6)).sum(-2, dtype=np.uint8)
    third = _fields(codes, 1, 32, 2).reshape(*shape, 32)
    return [third, _fields(codes, 2, 32).reshape(*shape, 64), low, high, _units(quantized)]


def _q2_k(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """Q2_K: 16 scales in the low halves of bytes and minima in the high ones, codes, f16 d and f16 m."""
    shape = _shape(quantized)
    assert quantized.zero_point is not None, "Q2_K has minima"
    minimum = quantized.zero_point.cpu().numpy().reshape(*shape, -1)
    return [_small(quantized) | minimum << 4, _fields(codes, 2, 32).reshape(*shape, 64), _units(quantized)]


def _iq4(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """IQ4_NL: f16 d, places in the table of 16 values. IQ4_XS: f16 d, 8 scales plus 32 of 6 bits, then the places.

    The upper two bits of scale j are bits 2j of 16, its lower four in the low or, where j is odd, high half of a byte.
    """
    import numpy as np

    places = np.zeros(256, np.uint8)
    places[_table()] = np.arange(16)
    if quantized.super_scale is None:
        scale = quantized.scale.cpu()[..., None].numpy()
        return [scale, _fields(places[codes], 4, 16).reshape(*scale.shape[:2], 16)]
    packed = _fields(places[codes], 4, 16).reshape(*_shape(quantized), 128)
    scale = _small(quantized) + 32
    high = ((scale >> 4).astype("<u2") << np.arange(0, 16, 2, dtype="<u2")).sum(-1, keepdims=True, dtype="<u2")
    return [_units(quantized), high, scale[..., ::2] & 15 | scale[..., 1::2] << 4, packed]


def _iq3_s(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """IQ3_S: f16 d, lower eight bits of the codewords' numbers, their ninth, a sign for each weight, 8 scales."""
    index, signs = _vectors(quantized, codes)
    scale = _odd(quantized)
    return [_units(quantized), *_low_and_high(index, 1), signs, scale[..., ::2] | scale[..., 1::2] << 4]


def _iq2_s(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """IQ2_S: f16 d, lower eight bits of the codewords' numbers, signs, upper two bits, 16 scales."""
    index, signs = _vectors(quantized, codes)
    scale, (low, high) = _odd(quantized), _low_and_high(index, 2)
    return [_units(quantized), low, signs, high, scale[..., ::2] | scale[..., 1::2] << 4]


def _iq2_xs(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """IQ2_XS: f16 d, 16 bits for 8 weights (number of the codeword, 7 signs above it), 16 scales."""
    index, signs = _vectors(quantized, codes)
    scale = _odd(quantized)
    words = index | (signs & 127).astype("<u2") << 9
    return [_units(quantized), words, scale[..., ::2] | scale[..., 1::2] << 4]


def _iq_xxs(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """IQ2_XXS and IQ3_XXS: f16 d, numbers of codewords of 8 bits, and for each group of 32 weights a word of 4 x 7
    signs with the scale above them. IQ2_XXS has the word of a group beside its four numbers.
    """
    import numpy as np

    index, signs = _vectors(quantized, codes)
    by_group = (signs & 127).reshape(*_shape(quantized), 8, 4).astype("<u4") << np.array([0, 7, 14, 21], "<u4")
    words = by_group.sum(-1, dtype="<u4") | _odd(quantized).astype("<u4") << 28
    index = index.astype(np.uint8)
    if quantized.scheme.vector == 4:
        return [_units(quantized), index, words]
    words = words[..., None].view(np.uint8)
    together = np.concatenate([index.reshape(*words.shape), words], -1)
    return [_units(quantized), together.reshape(*_shape(quantized), -1)]


def _nvfp4(quantized: QuantTensor, codes: np.ndarray) -> Parts:
    """NVFP4: 4 E4M3 scales, and for each 16 codes, of which the first 8 are in the low halves of bytes."""
    import torch

    rows, scale = len(codes), quantized.scale.cpu().contiguous().view(torch.uint8).numpy()
    return [scale.reshape(rows, -1, 4), pack_halves(e2m1_codes(codes), 8).reshape(rows, -1, BLOCK)]


PACKED: dict[str, Callable[[QuantTensor, np.ndarray], Parts]] = {
    "Q5_0": _five_bits,
    "Q5_1": _five_bits,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _superblock,
    "Q5_K": _superblock,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4,
    "IQ4_XS": _iq4,
    "IQ3_S": _iq3_s,
    "IQ3_XXS": _iq_xxs,
    "IQ2_S": _iq2_s,
    "IQ2_XS": _iq2_xs,
    "IQ2_XXS": _iq_xxs,
    "NVFP4": _nvfp4,
}


def _shape(quantized: QuantTensor) -> tuple[int, int]:
    """(out, superblocks of a row)."""
    rows, columns = quantized.shape
    return rows, columns // SUPERBLOCK


def _units(quantized: QuantTensor) -> np.ndarray:
    """Float16 [out, blocks, 1 or 2]."""
    assert quantized.super_scale is not None, "scales of two levels have units"
    return quantized.super_scale.cpu().numpy()


def _small(quantized: QuantTensor) -> np.ndarray:
    """The small scales, uint8 [out, blocks, groups of a block]; negative ones modulo 256."""
    import numpy as np

    return quantized.scale.cpu().contiguous().numpy().view(np.uint8).reshape(*_shape(quantized), -1)


def _odd(quantized: QuantTensor) -> np.ndarray:
    """The same of scales that are odd: 1, 3, 5, ... are stored as 0, 1, 2, ..."""
    return _small(quantized) >> 1


def _vectors(quantized: QuantTensor, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of codewords, uint16 [out, blocks, vectors of a block], and bits of negative weights, uint8 [out, blocks,
    32]. OutputError is never raised: codes that no codeword holds are our own mistake.
    """
    import numpy as np

    kind, shape = held_as(quantized.scheme), _shape(quantized)
    signed = codes.view(np.int8).reshape(*shape, -1)
    bits, numbers = _numbers(kind.name)
    sizes = np.abs(signed).reshape(*shape, -1, kind.vector)
    key = (bits[sizes].astype(np.uint32) << _shifts(kind)).sum(-1, dtype=np.uint32)
    index = numbers[key]
    assert (index != NO_CODEWORD).all(), f"a vector is no codeword of {kind.name}"
    return index, _bits((signed < 0).astype(np.uint8))


NO_CODEWORD = 0xFFFF


@cache
def _numbers(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Which of a type's magnitudes a value is, uint8 [128], and the codeword of each sequence of them, uint16."""
    import numpy as np

    from outlierq.ops.codebooks import codewords

    kind, words = block_types()[name], codewords(name).numpy().astype(np.uint8)
    bits = np.zeros(128, np.uint8)
    magnitudes = np.unique(words)
    bits[magnitudes] = np.arange(len(magnitudes))
    numbers = np.full(1 << 12 if kind.vector == 4 else 1 << 16, NO_CODEWORD, np.uint16)
    numbers[(bits[words].astype(np.uint32) << _shifts(kind)).sum(-1)] = np.arange(len(words))
    return bits, numbers


def _shifts(kind: BlockType) -> np.ndarray:
    """Where in a key each magnitude of a vector goes: 3 bits for each of 4, 2 for each of 8."""
    import numpy as np

    return np.arange(0, 12, 3, dtype=np.uint32) if kind.vector == 4 else np.arange(0, 16, 2, dtype=np.uint32)


@cache
def _table() -> np.ndarray:
    """The values of IQ4 as bytes."""
    import numpy as np

    from outlierq.ops.codebooks import levels

    return levels("IQ4_NL").numpy().astype(np.int8).view(np.uint8)


def _low_and_high(index: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower eight bits of numbers [..., n], and the upper `bits` of neighbouring ones side by side in bytes."""
    import numpy as np

    upper = (index >> 8).astype(np.uint8).reshape(*index.shape[:-1], -1, 8 // bits)
    return index.astype(np.uint8), (upper << np.arange(0, 8, bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def _bits(values: np.ndarray) -> np.ndarray:
    """Zeros and ones [..., 8 n] as bytes [..., n], the first in the lowest bit."""
    import numpy as np

    return np.packbits(values, axis=-1, bitorder="little")


def _fields(codes: np.ndarray, bits: int, run: int, shift: int = 0) -> np.ndarray:
    """`bits` bits of codes of any shape, those from `shift` on, as uint8 [codes * bits / 8].

    run: of so many bytes first the lowest bits hold codes, one after the other, then the next.
    """
    import numpy as np

    codes = np.ascontiguousarray(codes)
    packed = native_packing.fields(codes, bits, run, shift)
    if packed is not None:
        return packed
    apart = (codes >> shift & (1 << bits) - 1).reshape(-1, 8 // bits, run)
    made: np.ndarray = (apart << _column(*range(0, 8, bits))).sum(1, dtype=np.uint8)
    return made.reshape(-1)


def _column(*values: int) -> np.ndarray:
    """Uint8 [n, 1]."""
    import numpy as np

    return np.array(values, np.uint8)[:, None]
