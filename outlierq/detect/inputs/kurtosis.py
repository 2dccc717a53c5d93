"""Kurtosis E[(x - mu)^4] / sigma^4 from raw power sums: 3 for a Gauss, large for a few huge values.

As a sign of what will not quantize: Bondarenko et al. 2023, arXiv:2306.12929, section 3. Not the excess kurtosis.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError
from outlierq.core.stats import InputStats

SUMS = ("sum_x", "sum_sq", "sum_cube", "sum_fourth")


def kurtosis(stats: InputStats) -> float:
    """Kurtosis of all values of the input together, from its power sums [K]."""
    count = stats.tokens * stats.channels
    sums = torch.stack([stats.need(name).sum() for name in SUMS])
    value = from_power_sums(sums, count)
    if not value.isfinite():
        raise StatsError("the input is constant, so it has no kurtosis", hint="calibrate on more text")
    return value.item()


def channel_kurtosis(stats: InputStats) -> torch.Tensor:
    """[K] kurtosis of every channel over tokens; NaN for a constant channel."""
    return from_power_sums(torch.stack([stats.need(name) for name in SUMS]), stats.tokens)


def from_power_sums(sums: torch.Tensor, count: int) -> torch.Tensor:
    """Central moments from sums of x, x^2, x^3, x^4 ([4, ...] float64) over `count` values."""
    first, second, third, fourth = sums.double() / count
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return torch.where(variance > 1e-12 * second, central / variance**2, torch.nan)
