"""Reads the types of GGUF that only `type: NAME` stands for back into codes and scales, with numpy alone.

Shares no code with the exporter. Layouts are those of llama.cpp's `ggml-common.h`; codebooks are those of the package
`gguf`. A function is given blocks [rows, blocks of a row, bytes of a block].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.ops.compiled import unpacking

if TYPE_CHECKING:
    import numpy as np

# Codes [rows, blocks, columns], scales and minima [rows, blocks, groups] (None without), units [rows, blocks, 1 or 2].
Superblocks = tuple["np.ndarray", "np.ndarray", "np.ndarray | None", "np.ndarray"]
# Codes [rows, blocks, columns], float16 scales and minima [rows, blocks].
Blocks = tuple["np.ndarray", "np.ndarray", "np.ndarray | None"]


def of_superblocks(parts: Superblocks, scheme: QuantScheme) -> QuantTensor:
    """The tensor of what a function of `SUPERBLOCKS` has read."""
    import numpy as np
    import torch

    codes, scale, minimum, units = parts
    rows = len(codes)
    flat = [torch.from_numpy(np.ascontiguousarray(part).reshape(rows, -1)) for part in (codes, scale)]
    zero = None if minimum is None else torch.from_numpy(np.ascontiguousarray(minimum).reshape(rows, -1))
    return QuantTensor(*flat, zero, scheme, super_scale=torch.from_numpy(np.ascontiguousarray(units)))


def of_blocks(parts: Blocks, scheme: QuantScheme) -> QuantTensor:
    """The tensor of what a function of `SINGLE` has read."""
    import numpy as np
    import torch

    codes, scale, minimum = parts
    codes = np.ascontiguousarray(codes).reshape(len(codes), -1)
    low = None if minimum is None else torch.from_numpy(np.ascontiguousarray(minimum))
    return QuantTensor(torch.from_numpy(codes), torch.from_numpy(np.ascontiguousarray(scale)), low, scheme)


def halves(raw: np.ndarray) -> np.ndarray:
    """Float16 numbers [..., n] of bytes [..., 2 n]."""
    import numpy as np

    return np.ascontiguousarray(raw.view("<f2"))  # numbers are copied faster than bytes


def spread(raw: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Bytes [..., n] as numbers of `bits` bits [..., 8 n / bits]: of each run of bytes first the lowest bits of all of
    them, then the next.
    """
    import numpy as np

    made = unpacking.spread(raw, bits, run)
    if made is not None:
        return made
    if (bits, run) == (1, 1):
        return np.unpackbits(raw, axis=-1, bitorder="little")
    runs = raw.reshape(*raw.shape[:-1], -1, run)
    made = np.empty((*runs.shape[:-1], 8 // bits, run), np.uint8)
    for number in range(8 // bits):  # one pass for each is faster than shifts that broadcast
        np.right_shift(runs, bits * number, out=made[..., number, :])
    made &= (1 << bits) - 1
    return made.reshape(*raw.shape[:-1], -1)


def _q5_0(blocks: np.ndarray) -> Blocks:
    """f16 d, fifth bits, lower four bits: d * (q - 16)."""
    import numpy as np

    codes = spread(blocks[..., 6:], 4, 16) + spread(blocks[..., 2:6], 1, 1) * 16
    return codes.astype(np.int8) - np.int8(16), halves(blocks[..., :2])[..., 0], None


def _q5_1(blocks: np.ndarray) -> Blocks:
    """f16 d, f16 m, fifth bits, lower four bits: d * q + m."""
    units = halves(blocks[..., :4])
    codes = spread(blocks[..., 8:], 4, 16) + spread(blocks[..., 4:8], 1, 1) * 16
    return codes, units[..., 0], units[..., 1]


def _iq4_nl(blocks: np.ndarray) -> Blocks:
    """f16 d, places in the table."""
    return _table()[spread(blocks[..., 2:], 4, 16)], halves(blocks[..., :2])[..., 0], None


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of 8 groups out of 12 bytes.

    Those of group j < 4 are the low 6 bits of bytes j and j + 4. Those of j >= 4 have their low 4 bits in the halves of
    byte j + 4, their upper 2 in the upper 2 of bytes j - 4 and j.
    """
    import numpy as np

    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([first & 63, (third & 15) + (first >> 6) * 16], -1)
    return scale, np.concatenate([second & 63, (third >> 4) + (second >> 6) * 16], -1)


def _q4_k(blocks: np.ndarray) -> Superblocks:
    """f16 units of scales and minima, 12 bytes of those, 128 of codes: 32 bytes hold 64 columns."""
    return spread(blocks[..., 16:], 4, 32), *_six_bits(blocks[..., 4:16]), halves(blocks[..., :4])


def _q5_k(blocks: np.ndarray) -> Superblocks:
    """The same with 32 bytes of fifth bits before the others."""
    codes = spread(blocks[..., 48:], 4, 32) + spread(blocks[..., 16:48], 1, 32) * 16
    return codes, *_six_bits(blocks[..., 4:16]), halves(blocks[..., :4])


def _q6_k(blocks: np.ndarray) -> Superblocks:
    """128 bytes of lower four bits, 64 of upper two, 16 int8 scales, f16 unit: d * s * (q - 32)."""
    import numpy as np

    codes = spread(blocks[..., :128], 4, 64) + spread(blocks[..., 128:192], 2, 32) * 16
    scale = blocks[..., 192:208].view(np.int8)
    return codes.astype(np.int8) - np.int8(32), scale, None, halves(blocks[..., 208:])


def _q3_k(blocks: np.ndarray) -> Superblocks:
    """32 bytes of third bits, 64 of lower two, 12 of scales plus 32, f16 unit: d * (s - 32) * (q - 4)."""
    import numpy as np

    codes = spread(blocks[..., 32:96], 2, 32) + spread(blocks[..., :32], 1, 32) * 4
    scale = spread(blocks[..., 96:104], 4, 8) + spread(blocks[..., 104:108], 2, 4) * 16
    return codes.astype(np.int8) - np.int8(4), scale.astype(np.int8) - np.int8(32), None, halves(blocks[..., 108:])


def _q2_k(blocks: np.ndarray) -> Superblocks:
    """16 bytes with a scale in the low and a minimum in the high half, 64 of codes, f16 units."""
    return spread(blocks[..., 16:80], 2, 32), blocks[..., :16] & 15, blocks[..., :16] >> 4, halves(blocks[..., 80:])


def _iq4_xs(blocks: np.ndarray) -> Superblocks:
    """f16 unit, 16 bits of the scales' upper two, 4 bytes of their lower four, 128 of places in the table."""
    import numpy as np

    upper = spread(blocks[..., 2:4], 2, 1)
    scale = spread(blocks[..., 4:8], 4, 1) + upper * 16
    return (
        _table()[spread(blocks[..., 8:], 4, 16)],
        scale.astype(np.int8) - np.int8(32),
        None,
        halves(blocks[..., :2]),
    )


def _iq3_s(blocks: np.ndarray) -> Superblocks:
    """f16 unit, 64 bytes of numbers, 8 of their ninth bits, 32 of signs, 4 of scales."""
    index = blocks[..., 2:66].astype("<u2") + spread(blocks[..., 66:74], 1, 1) * _wide(256)
    return _signed("IQ3_S", index, blocks[..., 74:106]), _odd(blocks[..., 106:]), None, halves(blocks[..., :2])


def _iq3_xxs(blocks: np.ndarray) -> Superblocks:
    """f16 unit, 64 bytes of numbers, 8 words of 4 x 7 signs and a scale."""
    signs, scale = _words(blocks[..., 66:])
    return _signed("IQ3_XXS", blocks[..., 2:66], signs), scale, None, halves(blocks[..., :2])


def _iq2_s(blocks: np.ndarray) -> Superblocks:
    """f16 unit, 32 bytes of numbers, 32 of signs, 8 of the numbers' upper two bits, 8 of scales."""
    index = blocks[..., 2:34].astype("<u2") + spread(blocks[..., 66:74], 2, 1) * _wide(256)
    return _signed("IQ2_S", index, blocks[..., 34:66]), _odd(blocks[..., 74:]), None, halves(blocks[..., :2])


def _iq2_xs(blocks: np.ndarray) -> Superblocks:
    """f16 unit, 32 words of a number of 9 bits and 7 signs, 8 bytes of scales."""
    import numpy as np

    words = np.ascontiguousarray(blocks[..., 2:66]).view("<u2")
    codes = _signed("IQ2_XS", words & 511, _even(words >> 9))
    return codes, _odd(blocks[..., 66:]), None, halves(blocks[..., :2])


def _iq2_xxs(blocks: np.ndarray) -> Superblocks:
    """f16 unit, for each group of 32 four bytes of numbers and a word of 4 x 7 signs and a scale."""
    import numpy as np

    groups = blocks[..., 2:].reshape(*blocks.shape[:-1], 8, 8)
    signs, scale = _words(np.ascontiguousarray(groups[..., 4:]).reshape(*blocks.shape[:-1], 32))
    index = groups[..., :4].reshape(*blocks.shape[:-1], 32)
    return _signed("IQ2_XXS", index, signs), scale, None, halves(blocks[..., :2])


SUPERBLOCKS: dict[str, Callable[[np.ndarray], Superblocks]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "IQ3_S": _iq3_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ2_S": _iq2_s,
    "IQ2_XS": _iq2_xs,
    "IQ2_XXS": _iq2_xxs,
}
SINGLE: dict[str, Callable[[np.ndarray], Blocks]] = {"Q5_0": _q5_0, "Q5_1": _q5_1, "IQ4_NL": _iq4_nl}


def _wide(value: int) -> np.ndarray:
    """A number of 16 bits."""
    import numpy as np

    return np.array(value, "<u2")


def _table() -> np.ndarray:
    """Int8 [16]: the values that the places of IQ4 stand for."""
    import numpy as np
    from gguf.quants import IQ4_NL

    return np.array(IQ4_NL.kvalues, np.int8)


def _odd(packed: np.ndarray) -> np.ndarray:
    """Int8 scales out of halves of bytes, low ones first: s stands for 2 s + 1."""
    import numpy as np

    return (spread(packed, 4, 1) * 2 + 1).astype(np.int8)


def _words(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signs, a byte for every 8 weights, and scales out of words of 32 bits."""
    import numpy as np

    words = np.ascontiguousarray(packed).view("<u4")
    sevens = (words[..., None] >> np.arange(0, 28, 7, dtype="<u4")) & 127
    return _even(sevens.reshape(*words.shape[:-1], -1)), ((words >> 28) * 2 + 1).astype(np.int8)


def _even(sevens: np.ndarray) -> np.ndarray:
    """Bytes of 8 signs out of seven: the last makes the number of negative weights even."""
    import numpy as np

    odd = sum((sevens >> bit) & 1 for bit in range(7)) & 1
    return (sevens + odd * 128).astype(np.uint8)


def _signed(name: str, index: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Int8 [..., columns] of numbers of codewords [..., n] and bytes of signs [..., columns / 8]; 1 is negative."""
    import numpy as np
    from gguf import quants

    table = getattr(quants, name)
    table.init_grid()
    words = table.grid.reshape(table.grid_shape).astype(np.int8)
    if int(index.max(initial=0)) >= len(words):
        raise SourceError(f"a block of {name} names codeword {int(index.max())}, there are {len(words)}")
    sizes = words[index].reshape(*index.shape[:-1], -1)
    return np.where(spread(signs, 1, 1) == 1, -sizes, sizes)
