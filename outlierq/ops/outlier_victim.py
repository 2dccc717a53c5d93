"""Outlier-victim pairs: 4 bits for every weight, where an outlier takes the code of its neighbour (OliVe).

Guo et al. 2023, arXiv:2304.07493. Of two neighbours in a row both are integers from -7 to 7; or one of them is the
victim, whose nibble 1000 says that its value is 0, and the other one an outlier: an "abfloat" of sign, two exponent
bits and one mantissa bit, 12 to 96. Values are in units of the scale that both share.
"""

from __future__ import annotations

import torch

from outlierq.core.scheme import QuantScheme

NORMAL_MAX = 7
VICTIM = 0b1000  # the code of -8, which no normal value has
BIAS = 2  # the least with which the smallest outlier is above the largest normal value
# sign * (2 + mantissa) << (exponent + BIAS); code 0 would be 8, and with its sign the victim's.
MAGNITUDES = tuple((2 + (code & 1)) << ((code >> 1) + BIAS) for code in range(1, 8))
SPREAD = 3.0  # standard deviations at which outliers begin where nothing is searched


def nearest_outlier(u: torch.Tensor) -> torch.Tensor:
    """The abfloat nearest to each value; small ones become the smallest. u: float32, any shape."""
    grid = torch.tensor(MAGNITUDES, dtype=u.dtype, device=u.device)
    return grid[torch.bucketize(u.abs(), (grid[1:] + grid[:-1]) / 2)] * torch.where(u < 0, -1.0, 1.0)


def nearest_normal(u: torch.Tensor) -> torch.Tensor:
    """The integer from -7 to 7 nearest to each value. u: float32, any shape."""
    return u.round().clamp(-NORMAL_MAX, NORMAL_MAX)


def nearest_pairs(u: torch.Tensor, curvature: torch.Tensor | None = None) -> torch.Tensor:
    """Values in units of their scale, float32 [out, in], as pairs can hold them; `in` must be even.

    curvature: [in / 2, 2, 2] or [1, 2, 2], of the error of each pair; None: all errors count alike. A pair takes the
    cheapest of three ways: both normal, or either one an outlier and the other its victim. What is rounded last makes
    up for what the other one lost, where the curvature says that it can.
    """
    first, second = u.unflatten(1, (-1, 2)).unbind(-1)
    cost = torch.eye(2, device=u.device)[None] if curvature is None else curvature
    both = cost[:, 0, 1]
    pull = [torch.where(own > 0, both / own, 0.0) for own in (cost[:, 0, 0], cost[:, 1, 1])]
    whole, nothing = nearest_normal(first), torch.zeros_like(first)
    ways = (
        (whole, nearest_normal(second - pull[1] * (whole - first))),
        (nearest_outlier(first + pull[0] * second), nothing),
        (nothing, nearest_outlier(second + pull[1] * first)),
    )
    left = [(a - first, b - second) for a, b in ways]
    errors = [cost[:, 0, 0] * a * a + 2 * both * a * b + cost[:, 1, 1] * b * b for a, b in left]
    way = torch.stack(errors).argmin(0)
    halves = [torch.where(way == 0, ways[0][h], torch.where(way == 1, ways[1][h], ways[2][h])) for h in range(2)]
    return torch.stack(halves, -1).flatten(1)


def curvatures(blocks: torch.Tensor | None, scheme: QuantScheme) -> torch.Tensor | None:
    """[in / 2, 2, 2] float32, those of pairs of a hessian's diagonal blocks [groups, columns, columns], or of their
    diagonals [groups, columns]. None without one, and for schemes whose columns are rounded one by one.
    """
    if blocks is None or scheme.kind != "outlier-victim":
        return None
    if blocks.dim() == 2:
        return torch.diag_embed(blocks.float().reshape(-1, 2))
    groups, columns = blocks.shape[:2]
    pairs = blocks.view(groups, columns // 2, 2, columns // 2, 2).diagonal(dim1=1, dim2=3)  # [groups, 2, 2, pairs]
    return pairs.permute(0, 3, 1, 2).reshape(-1, 2, 2).float()


def encode(values: torch.Tensor) -> torch.Tensor:
    """Nibbles uint8 [out, in] of what `nearest_pairs` gives."""
    size = values.abs().to(torch.int16)
    sign = torch.where(values < 0, 8, 0).to(torch.uint8)
    grid = torch.tensor(MAGNITUDES, dtype=torch.int16, device=values.device)
    outlier = sign | (torch.bucketize(size, grid) + 1).to(torch.uint8)
    normal = values.to(torch.int8).view(torch.uint8) & 15
    is_outlier = size > NORMAL_MAX
    beside = is_outlier.unflatten(1, (-1, 2)).flip(-1).flatten(1)
    return torch.where(is_outlier, outlier, torch.where(beside, VICTIM, normal)).to(torch.uint8)


def decode(nibbles: torch.Tensor) -> torch.Tensor:
    """Float32 values [out, in] in units of the scale; the inverse of `encode`."""
    pairs = nibbles.unflatten(1, (-1, 2))
    victim = pairs == VICTIM
    table = torch.tensor([0, *MAGNITUDES], dtype=torch.float32, device=nibbles.device)
    outlier = table[(pairs & 7).long()] * torch.where(pairs >= 8, -1.0, 1.0)
    wide = pairs.to(torch.float32)
    values = torch.where(victim.flip(-1), outlier, torch.where(pairs >= 8, wide - 16, wide))
    return values.masked_fill(victim, 0.0).flatten(1)


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """Two nibbles a byte, the first one in the low half: uint8 [out, in / 2]."""
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: uint8 [out, in]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def spread_scale(grouped: torch.Tensor) -> torch.Tensor:
    """[out, groups] scales with which outliers begin at three standard deviations; 0 where all weights are.

    grouped: [out, groups, columns]. No weight lies beyond the largest outlier.
    """
    start = (SPREAD * grouped.std(-1, unbiased=False) + grouped.mean(-1).abs()) / NORMAL_MAX
    return start.maximum(grouped.abs().amax(-1) / MAGNITUDES[-1])
