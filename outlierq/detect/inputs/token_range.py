"""Token range: the largest tokens against the median token, by max_c |x_tc|.

A static scale has to hold the largest token; one scale per token does not care. From the histogram of half octaves, so
figures are steps of sqrt(2).
"""

from __future__ import annotations

from outlierq.core.errors import StatsError
from outlierq.core.stats import InputStats


def token_range(stats: InputStats, *, share: float = 0.999) -> float:
    """Quantile `share` of max_c |x_tc| over tokens, divided by its median; from token_histogram [64]."""
    histogram = stats.need("token_histogram").double()
    reached = histogram.cumsum(0) / histogram.sum()
    if not reached[-1] > 0:
        raise StatsError("the histogram of tokens is empty", hint="calibrate on more text")
    top, middle = (int((reached < level).sum()) for level in (share, 0.5))
    ratio: float = 2.0 ** ((top - middle) / 2)  # bins are half powers of two wide
    return ratio
