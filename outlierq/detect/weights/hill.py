"""Hill's estimate of the exponent alpha of a power-law tail p(x) ~ x^-alpha. Hill 1975, Annals of Statistics 3(5).

alpha = 1 + k / sum_{i <= k} ln(x_(i) / x_(k+1)) with x_(1) >= x_(2) >= ... the largest values. Small is heavy: below 3
the variance of the tail is infinite. A Pareto density of exponent 2.5 gives 2.5; the tail of a Gauss gives about 7.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError

# Share of the magnitudes that counts as the tail of an activation. Spectra use half (see farms.py).
TAIL = 0.05
FEWEST = 10


def hill_alpha(values: torch.Tensor, *, tail: float = TAIL) -> float:
    """Exponent of the upper `tail` of the positive values [n]; StatsError with fewer than 10 of them in the tail."""
    return hill_alphas(values.flatten()[:, None], tail=tail).item()


def hill_alphas(columns: torch.Tensor, *, tail: float = TAIL) -> torch.Tensor:
    """[k] the same for every column of [n, k]. Zeros are no tail: a column whose x_(k+1) is 0 gets NaN."""
    count = int(tail * len(columns))
    if count < FEWEST:
        raise StatsError(
            f"a tail of {count} of {len(columns)} values is too short for Hill's estimate (at least {FEWEST})",
            hint="calibrate with more tokens",
        )
    largest = columns.double().topk(count + 1, dim=0).values
    start = torch.where(largest[-1] > 0, largest[-1], torch.nan)
    spread = (largest[:-1] / start).log().sum(0)
    return 1 + count / spread
