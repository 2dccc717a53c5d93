"""How much lies outside Tukey's fences [Q1 - 1.5 IQR, Q3 + 1.5 IQR] (Gauss 0.70 %).

Tukey 1977, Exploratory Data Analysis. Unlike sigma, quartiles are not moved by the outliers themselves.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError


def iqr_rate(values: torch.Tensor, *, fence: float = 1.5) -> torch.Tensor:
    """Share, 0..1, outside of the fences along dimension 0: [] for [n], [k] for [n, k]. At least 8 values."""
    if len(values) < 8:
        raise StatsError(f"{len(values)} values are too few for quartiles", hint="calibrate with more tokens")
    ordered = values.float().sort(dim=0).values
    low, high = quantile(ordered, 0.25), quantile(ordered, 0.75)
    reach = fence * (high - low)
    return ((ordered < low - reach) | (ordered > high + reach)).float().mean(0)


def quantile(ordered: torch.Tensor, share: float) -> torch.Tensor:
    """Linear interpolation between neighbours of sorted values; torch.quantile refuses more than 16 million.

    ordered: [n, ...] ascending along the first axis, which goes.
    """
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below].lerp(ordered[above], place - below)
