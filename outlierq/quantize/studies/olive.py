"""OliVe: an outlier takes the code of its neighbour. Guo et al. 2023, arXiv:2304.07493.

Exactly 4 bits a weight and one scale a row, without an index of the outliers. No runtime decodes it.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.outlier_victim import NORMAL_MAX, decode, encode
from outlierq.registry import approximation

# Shares of three standard deviations at which outliers begin: the range that the paper's code searches.
LOWEST, HIGHEST = 0.75, 2.5


@approximation("olive", needs=("sum_sq",), paper="arXiv:2304.07493")
def olive(
    w: torch.Tensor, stats: InputStats, scheme: QuantScheme, *, steps: Annotated[int, Ge(1)] = 36
) -> Approximation:
    """Outlier-victim pairs with one scale a row, chosen by output error (of a diagonal hessian).

    w: [out, in] float32. steps: thresholds that are tried; the paper's code tries 88. `scheme` is not asked: 4 bits.
    """
    importance = stats.need("sum_sq").float() / stats.tokens
    values, _ = best_pairs(w, importance, steps)
    return Approximation(values, 4 + 16 / w.shape[1])


def best_pairs(w: torch.Tensor, importance: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded weights [out, in] and scales [out] with the least error weighed by `importance` [in].

    Rows of odd length get a zero at their end, which is not given back.
    """
    missing = w.shape[1] % 2
    padded, weight = (torch.nn.functional.pad(each, (0, missing)) for each in (w, importance))
    start = 3 * w.std(1, unbiased=False) + w.mean(1).abs()
    start = torch.where(start > 0, start, torch.ones_like(start)) / NORMAL_MAX
    best = w.new_zeros(padded.shape)
    best_scale, least = start.clone(), w.new_full(start.shape, torch.inf)
    for share in torch.linspace(LOWEST, HIGHEST, steps).tolist():
        scale = (start * share).bfloat16().float()
        values = decode(encode(padded / scale[:, None], weight)) * scale[:, None]
        error = ((values - padded).square() * weight).sum(1)
        better = error < least
        best[better], best_scale[better], least[better] = values[better], scale[better], error[better]
    return best[:, : w.shape[1]], best_scale
