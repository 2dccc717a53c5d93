"""OWL's layer outlier ratio. Yin et al. 2023, arXiv:2310.05175, section 3.2.

D = 100 * share of the weights of a block with A_ij > M * mean(A), A_ij = |W_ij| * ||X_j||_2, M = 5; all linears of the
block in one pool. A high D marks a block that needs more bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def outlier_ratio(linears: Sequence[tuple[torch.Tensor, torch.Tensor]], *, times: float = 5.0) -> float:
    """Percent of outlying weights. linears: (weight [out, in], root mean square [in] of its input)."""
    scores = [weight.abs().float() * rms.float() for weight, rms in linears]
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    above = sum(int((score > times * mean).sum()) for score in scores)
    return 100.0 * above / count
