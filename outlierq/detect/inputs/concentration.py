"""Concentration: the share of all energy that the strongest 1 % of the channels carry.

sum over the top channels of sum_t x_tc^2, over the same sum of all channels. Evenly spread channels give 0.01. It is
what a split of outlier columns (Dettmers et al. 2022, arXiv:2208.07339, section 3.2) would keep in 16 bits.
"""

from __future__ import annotations

from math import ceil

from outlierq.core.errors import StatsError
from outlierq.core.stats import InputStats


def top_share(stats: InputStats, *, share: float = 0.01) -> float:
    """Energy share, 0..1, of the strongest `share` of the channels (at least one), from sum_sq [K]."""
    energy = stats.need("sum_sq")
    total = energy.sum().item()
    if total == 0:
        raise StatsError("every input is 0", hint="is this site used at all? Check the calibration text")
    return energy.topk(ceil(share * len(energy))).values.sum().item() / total
