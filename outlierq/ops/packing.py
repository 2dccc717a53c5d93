"""Dense packing of small unsigned integers into int32 words, least significant bits first."""

from __future__ import annotations

import torch

WORD = 32


def words_for(values: int, bits: int) -> int:
    """Number of int32 words that hold `values` integers of `bits` bits without gaps."""
    return -(-values * bits // WORD)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack each row of `values` [rows, n] (0 <= value < 2^bits) into int32 [rows, ceil(n * bits / 32)].

    Value i of a row occupies bits i*bits .. i*bits + bits - 1 of the row's bit string; it may straddle two words
    (compressed-tensors 0.19 and later). Widths 2, 4 and 8 are packed byte by byte, which is many times faster.
    """
    rows, count = values.shape
    if bits in (2, 4, 8):
        return _pack_bytes(values, bits)
    position = torch.arange(count, device=values.device) * bits
    word, shift = position // WORD, position % WORD
    wide = values.long() << shift
    packed = torch.zeros(rows, words_for(count, bits) + 1, dtype=torch.int64, device=values.device)
    packed.index_add_(1, word, wide & 0xFFFFFFFF)
    packed.index_add_(1, word + 1, wide >> WORD)
    packed = packed[:, :-1]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def _pack_bytes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The widths that divide 8: combine neighbours into bytes, then read four bytes as one little-endian word."""
    per_byte = 8 // bits
    missing = -values.shape[1] % (WORD // bits)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    values = values.to(torch.uint8)
    if per_byte == 1:
        return values.contiguous().view(torch.int32)
    packed = values[:, 0::per_byte].clone()
    for i in range(1, per_byte):
        packed |= values[:, i::per_byte] << (bits * i)
    return packed.contiguous().view(torch.int32)
