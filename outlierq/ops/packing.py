"""Dense packing of small integers into int32 words or bytes, least significant bits first.

Neighbouring codes are moved together inside wider machine words, in pieces that stay in the cache: on one core 4-bit
codes take hardly twice as long as a copy of them. numpy does it (on small integers it is quicker than torch), or, where
there is one, what was compiled from C (ops/compiled/packing.py), to the same byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from outlierq.ops.compiled import packing as native_packing
from outlierq.ops.compiled.products import float_bits

if TYPE_CHECKING:
    import numpy as np

WORD = 32
ROWS_PER_WORD = WORD  # rows that fill whole words of any width, where zero points are packed along them
PIECE = 1 << 18  # codes worked on at a time


def words_for(values: int, bits: int) -> int:
    """Number of int32 words that hold `values` integers of `bits` bits without gaps."""
    return -(-values * bits // WORD)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row of `values` [rows, n] into int32 [rows, ceil(n * bits / 32)], on the CPU.

    values: 0 <= value < 2^bits; or, as int8, -2^(bits-1) <= value < 2^(bits-1), to which 2^(bits-1) is added.
    Value i of a row occupies bits i*bits .. i*bits + bits - 1 of the row's bit string; it may straddle two words
    (compressed-tensors 0.19 and later).
    """
    import numpy as np

    rows, count = values.shape
    words = words_for(count, bits)
    given, flip = _bytes(values, bits)
    whole = not (count % 8 or count * bits % WORD)
    compiled = native_packing.bit_string(given, bits, flip) if whole else None
    if compiled is not None:
        return compiled.view(torch.int32).view(rows, words)
    codes = given.numpy().view(np.uint8)
    if not whole:
        filled = np.full((rows, _whole(words * WORD // bits, 8)), flip, np.uint8)
        filled[:, :count] = codes
        packed = pack_bytes(filled, bits, flip).reshape(rows, -1)
        codes = np.zeros((rows, words * 4), np.uint8)
        width = min(words * 4, packed.shape[1])
        codes[:, :width] = packed[:, :width]
        return torch.from_numpy(codes.view(np.int32))
    return torch.from_numpy(pack_bytes(codes, bits, flip).view(np.int32).reshape(rows, words))


def pack_bytes(codes: np.ndarray, bits: int, flip: int = 0) -> np.ndarray:
    """The codes, a multiple of 8 in number, as uint8 [codes * bits / 8]: a bit string in the order of the array.

    codes: uint8, contiguous; `flip` is what is added to them modulo 2^bits, 0 or 2^(bits-1).
    """
    import numpy as np

    flat = codes.reshape(-1)
    if bits == 8:
        return flat ^ np.uint8(flip)
    packed = np.empty(flat.size * bits // 8, np.uint8)
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        out = packed[start * bits // 8 : (start + piece.size) * bits // 8]
        if bits == 4:
            _nibbles(piece, flip, out)
        else:
            out.reshape(-1, bits)[:] = _eights(piece, bits, flip)
    return packed


def pack_down(values: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack`, transposed: int32 [n * bits / 32, rows], each column one bit string."""
    codes, flip = _bytes(values, bits)
    words = native_packing.gptq_words(codes, bits, flip)
    return pack(codes, bits).T.contiguous() if words is None else words


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """E2M1 numbers [..., n] in float8_e4m3fn, n a multiple of 8, as uint8 [..., n / 2]: two codes in each byte."""
    stored = values.detach().cpu().contiguous()
    packed = native_packing.bit_string(stored, 4, e2m1=True)
    if packed is None:
        packed = torch.from_numpy(pack_bytes(e2m1_codes(stored.view(torch.uint8).numpy()), 4))
    return packed.view(*values.shape[:-1], values.shape[-1] // 2)


def pack_e2m3(values: torch.Tensor) -> torch.Tensor:
    """E2M3 numbers [rows, n] in float8_e4m3fn as uint8 [rows, 3 n / 4]: four codes in three bytes; n: of 16 each."""
    return pack(float_bits(values.detach().cpu(), "e2m3"), 6).view(torch.uint8)


def pack_halves(codes: np.ndarray, run: int, flip: int = 0) -> np.ndarray:
    """Codes of 4 bits as uint8 [codes / 2]: of each 2 * run, the first `run` in low halves, the others in high ones.

    codes: uint8, contiguous, a whole number of runs. run: a multiple of 8. flip: as in `pack_bytes`.
    """
    import numpy as np

    flat, width = codes.reshape(-1), run // 8
    packed = np.empty(flat.size // 2, np.uint8)
    for start in range(0, flat.size, PIECE):
        words = flat[start : start + PIECE].view("<u8") & _mask(4, 8)
        words ^= _mask(1, 8) * np.uint64(flip)
        out = packed[start // 2 : start // 2 + words.nbytes // 2].view("<u8")
        for place in range(width):
            np.left_shift(words[width + place :: 2 * width], np.uint64(4), out=out[place::width])
            out[place::width] |= words[place :: 2 * width]
    return packed


def interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [..., n, bytes of each] of any dtype, side by side: uint8 [..., n, bytes of all]."""
    import numpy as np

    flat = [np.ascontiguousarray(part) for part in parts]
    widths = [part.shape[-1] * part.itemsize for part in flat]
    record = np.dtype([(f"part{number}", f"V{width}") for number, width in enumerate(widths)])
    together = np.empty(flat[0].shape[:-1], record)
    for number, (part, width) in enumerate(zip(flat, widths, strict=True)):
        together[f"part{number}"] = part.view(f"V{width}")[..., 0]
    return together.view(np.uint8).reshape(*together.shape, sum(widths))


def e2m1_codes(stored: np.ndarray) -> np.ndarray:
    """The 4-bit codes of E2M1 numbers that are given as the bytes of E4M3 ones, uint8 of the same shape.

    stored: uint8, contiguous, a multiple of 8 in number. The bytes are s0000000 for 0, s0110000 for 0.5, s0111000 for
    1, s0111100 for 1.5, s1000000 for 2, s1000100 for 3, s1001000 for 4 and s1001100 for 6. So bits 7, 6, 3 and 2 are
    the code, but for its last bit at 0.5, the only number with bit 4 and without bit 3.
    """
    import numpy as np

    codes, given = np.empty_like(stored), stored.reshape(-1).view("<u8")
    words = codes.reshape(-1).view("<u8")
    upper, lower, last = _mask(2, 8) << np.uint64(2), _mask(2, 8), _mask(1, 8)
    for start in range(0, given.size, PIECE // 8):
        piece, out = given[start : start + PIECE // 8], words[start : start + PIECE // 8]
        high, low = piece >> np.uint64(4), piece >> np.uint64(2)
        half = ~(piece >> np.uint64(3))
        half &= high
        half &= last
        high &= upper
        low &= lower
        high |= low
        np.bitwise_or(high, half, out=out)
    return codes


def _bytes(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """Codes of one byte, contiguous on the CPU, and what is to be added to them: 2^(bits-1) to signed ones."""
    signed = values.dtype == torch.int8
    return (values if signed else values.to(torch.uint8)).detach().cpu().contiguous(), signed << (bits - 1)


def _whole(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`."""
    return -(-count // unit) * unit


def _nibbles(codes: np.ndarray, flip: int, out: np.ndarray) -> None:
    """Two codes of 4 bits into each byte of `out`: pairs are words of 16 bits, whose upper half moves down by 4."""
    import numpy as np

    pairs = codes.view("<u2") & np.uint16(0x0F0F)
    pairs |= pairs >> np.uint16(4)
    pairs ^= np.uint16(flip * 0x11)
    out[:] = pairs  # cut off to the lower byte


def _eights(codes: np.ndarray, bits: int, flip: int) -> np.ndarray:
    """Bytes [codes / 8, bits]: eight codes are a word of 64 bits; codes, then pairs, then fours move together."""
    import numpy as np

    words = codes.view("<u8") & _mask(bits, 8)
    words ^= _mask(1, 8) * np.uint64(flip)
    for width in (8, 16, 32):
        used = bits * width // 8
        low = words & _mask(used, 2 * width)
        words >>= np.uint64(width - used)
        words &= _mask(used, 2 * width) << np.uint64(used)
        words |= low
    return words.view(np.uint8).reshape(-1, 8)[:, :bits]


@cache
def _mask(bits: int, width: int) -> np.uint64:
    """A word of 64 bits with the lowest `bits` of every `width` set."""
    import numpy as np

    return np.uint64(sum(((1 << bits) - 1) << place for place in range(0, 64, width)))
