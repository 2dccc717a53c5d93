"""Outlier-victim pairs: 4 bits for every weight, where an outlier takes the code of its neighbour (OliVe).

Guo et al. 2023, arXiv:2304.07493. Of two neighbours in a row both are integers from -7 to 7; or one of them is the
victim, whose nibble 1000 says that its value is 0, and the other one an outlier: an "abfloat" of sign, two exponent
bits and one mantissa bit, 12 to 96. Values are in units of the row's scale.
"""

from __future__ import annotations

import torch

NORMAL_MAX = 7
VICTIM = 0b1000  # the code of -8, which no normal value has
BIAS = 2  # the least with which the smallest outlier is above the largest normal value
# sign * (2 + mantissa) << (exponent + BIAS); code 0 would be 8, and with its sign the victim's.
MAGNITUDES = tuple((2 + (code & 1)) << ((code >> 1) + BIAS) for code in range(1, 8))


def nearest_outlier(u: torch.Tensor) -> torch.Tensor:
    """The nibble of the abfloat nearest to each value; small ones become the smallest. u: float32, any shape."""
    grid = torch.tensor(MAGNITUDES, dtype=u.dtype, device=u.device)
    code = torch.bucketize(u.abs(), (grid[1:] + grid[:-1]) / 2) + 1
    return (code + torch.where(u < 0, 8, 0)).to(torch.uint8)


def nearest_normal(u: torch.Tensor) -> torch.Tensor:
    """The nibble [...] of the integer from -7 to 7 nearest to each value, in two's complement."""
    return u.round().clamp(-NORMAL_MAX, NORMAL_MAX).to(torch.int8).view(torch.uint8) & 15


def values_of_normal(nibbles: torch.Tensor) -> torch.Tensor:
    """Float32 integers [...] of two's complement nibbles."""
    wide = nibbles.to(torch.float32)
    return torch.where(nibbles >= 8, wide - 16, wide)


def values_of_outlier(nibbles: torch.Tensor) -> torch.Tensor:
    """Float32 abfloats [...]; those of codes without one are not asked for."""
    table = torch.tensor([0, *MAGNITUDES], dtype=torch.float32, device=nibbles.device)
    return table[(nibbles & 7).long()] * torch.where(nibbles >= 8, -1.0, 1.0)


def encode(u: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Nibbles uint8 [out, in] of values in units of their scale, float32 [out, in]; `in` must be even.

    importance: [in], what a squared error costs in each channel; None: the same everywhere. Each pair takes the
    cheapest of three ways: both normal, or either one an outlier and the other its victim. So no pair errs more than
    two integers do.
    """
    pairs = u.unflatten(1, (-1, 2))
    weight = torch.ones(u.shape[1], device=u.device) if importance is None else importance
    weight = weight.unflatten(0, (-1, 2))
    normal, outlier = nearest_normal(pairs), nearest_outlier(pairs)
    cost_normal = (values_of_normal(normal) - pairs).square() * weight
    cost_outlier = (values_of_outlier(outlier) - pairs).square() * weight
    lost = pairs.square() * weight
    ways = torch.stack(
        [cost_normal.sum(-1), cost_outlier[..., 0] + lost[..., 1], lost[..., 0] + cost_outlier[..., 1]], -1
    )
    way = ways.argmin(-1)[..., None]
    slot = torch.arange(2, device=u.device)
    nibbles = torch.where(way == 0, normal, torch.where(way == slot + 1, outlier, torch.full_like(normal, VICTIM)))
    return nibbles.flatten(1)


def decode(nibbles: torch.Tensor) -> torch.Tensor:
    """Float32 values [out, in] in units of the scale; the inverse of `encode`, up to what it rounded."""
    pairs = nibbles.unflatten(1, (-1, 2))
    victim = pairs == VICTIM
    beside = victim.flip(-1)
    values = torch.where(beside, values_of_outlier(pairs), values_of_normal(pairs))
    return values.masked_fill(victim, 0.0).flatten(1)


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """Two nibbles a byte, the first one in the low half: uint8 [out, in / 2]."""
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: uint8 [out, in]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
