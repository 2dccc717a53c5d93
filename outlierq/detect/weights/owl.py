"""OWL's layer outlier ratio. Yin et al. 2023, arXiv:2310.05175, section 3.2.

D = 100 * share of the weights of a block with A_ij > M * mean(A), A_ij = |W_ij| * ||X_j||_2, M = 5; all linears of the
block in one pool. A high D marks a block that needs more bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SPREAD = 0.08  # of the sparsities around their mean, section 4: lambda


def outlier_ratio(linears: Sequence[tuple[torch.Tensor, torch.Tensor]], *, times: float = 5.0) -> float:
    """Percent of outlying weights. linears: (weight [out, in], root mean square [in] of its input)."""
    scores = [weight.abs().float() * rms.float() for weight, rms in linears]
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    above = sum(int((score > times * mean).sum()) for score in scores)
    return 100.0 * above / count


def sparsities(ratios: Sequence[float], sizes: Sequence[int], mean: float, *, spread: float = SPREAD) -> list[float]:
    """Share of zeros for every block: less where D is high, within `spread` of each other's middle, `mean` over all.

    ratios: D by block; sizes: its weights, by which the mean is taken. Equal ratios give the mean everywhere.
    """
    width = max(ratios) - min(ratios)
    raised = [2 * spread * (ratio - min(ratios)) / width if width else 0.0 for ratio in ratios]
    middle = sum(each * size for each, size in zip(raised, sizes, strict=True)) / sum(sizes)
    return [min(max(mean - each + middle, 0.0), 0.99) for each in raised]
