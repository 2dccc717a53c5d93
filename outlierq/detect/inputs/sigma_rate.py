"""How much lies outside mu +- 3 sigma (Gauss 0.27 %), and how many sigma away the largest value is.

OliVe (Guo et al. 2023, arXiv:2304.07493, section 2) counts outliers this way and finds transformers at up to 325 sigma
where convolutional networks stay below 28.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError
from outlierq.core.stats import InputStats


def sigma_rate(stats: InputStats, rows: torch.Tensor, *, sigmas: float = 3.0) -> float:
    """Share, 0..1, of the sampled values outside mu +- `sigmas` * sigma of the whole input. rows: [R, K]."""
    mean, deviation = mean_and_deviation(stats)
    return ((rows.float() - mean).abs() > sigmas * deviation).float().mean().item()


def largest_sigma(stats: InputStats) -> float:
    """Distance of the most extreme value from the mean, in standard deviations of the whole input.

    From min, max, sum_x and sum_sq, [K] each.
    """
    mean, deviation = mean_and_deviation(stats)
    lowest, highest = stats.need("min").min().item(), stats.need("max").max().item()
    return max(mean - lowest, highest - mean) / deviation


def mean_and_deviation(stats: InputStats) -> tuple[float, float]:
    """Of all values of the input together, from sum_x and sum_sq [K]; StatsError when they are all equal."""
    count = stats.tokens * stats.channels
    mean = stats.need("sum_x").sum().item() / count
    variance = stats.need("sum_sq").sum().item() / count - mean**2
    if variance <= 0:
        raise StatsError("all inputs are equal, so there is no standard deviation", hint="calibrate on more text")
    return mean, variance**0.5


def column_sigma_rate(columns: torch.Tensor, *, sigmas: float = 3.0) -> torch.Tensor:
    """[k] the same for single channels, with their own mean and deviation in the sample. columns: [R, k]."""
    centred = columns - columns.mean(0)
    return (centred.abs() > sigmas * centred.square().mean(0).sqrt()).float().mean(0)
