"""QSUR: how much of the cube that a quantizer spans the data fill. OSTQuant, Hu et al. 2025, arXiv:2501.13987, Eq. 2.

For a zero-mean Gauss with covariance S in d dimensions, the volume of its ellipsoid over that of the enclosing cube:
pi^(d/2) / Gamma(d/2 + 1) * sqrt(det S) / (2 max_j sqrt(S_jj))^d. Reported as (1/d) log QSUR, in nats a channel. The
extent along axis j is the ellipsoid's exact one, sqrt(S_jj); the paper takes the end of the principal axis.

A rotation leaves det S alone, so the best one makes all S_jj equal to trace(S) / d: `rotation_gain` is how much of the
cube it would win, without any determinant.
"""

from __future__ import annotations

from math import lgamma, log, pi

import torch

from outlierq.core.errors import StatsError
from outlierq.core.stats import InputStats

# A Cholesky factor of this width takes a second on two cores; wider inputs would dominate the whole report.
WIDEST = 4096


def covariance(stats: InputStats) -> torch.Tensor:
    """[K, K] of the input over the calibration tokens."""
    mean = stats.need("mean")
    return stats.need("hessian") - mean[:, None] * mean[None, :]


def log_qsur(covariance: torch.Tensor) -> float:
    """(1/d) log QSUR of a covariance [d, d]; StatsError when it is singular or wider than 4096.

    The determinant comes from the correlation matrix, whose factor is far better conditioned.
    """
    width = len(covariance)
    if width > WIDEST:
        raise StatsError(f"{width} channels are more than the {WIDEST} whose determinant is computed")
    variance = covariance.diagonal()
    deviation = variance.clamp(min=0).sqrt()
    scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    factor, failed = torch.linalg.cholesky_ex(covariance / (scale[:, None] * scale[None, :]))
    if failed or not factor.isfinite().all() or not (variance > 0).all():
        raise StatsError(
            f"the covariance [{width}, {width}] is singular, so its ellipsoid has no volume",
            hint="calibrate with more tokens than channels; dead channels have none at all",
        )
    log_determinant: float = 2 * (factor.diagonal().double().log() + deviation.double().log()).sum().item()
    log_ball = width / 2 * log(pi) - lgamma(width / 2 + 1)
    return (log_ball + log_determinant / 2) / width - log(2 * deviation.max().item())


def rotation_gain(covariance: torch.Tensor) -> float:
    """log(max_j sqrt(S_jj)) - log(sqrt(trace(S) / d)), what the best rotation adds to `log_qsur`. S: [d, d]."""
    variance = covariance.diagonal().double()
    if not variance.max() > 0:
        raise StatsError("the input is constant, so there is nothing to rotate", hint="calibrate on more text")
    return 0.5 * (variance.max() / variance.mean()).log().item()
