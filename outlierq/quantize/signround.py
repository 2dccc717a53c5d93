"""Rounding that is learned by signs of gradients, linear by linear. SignRound, Cheng et al. 2023, arXiv:2309.05516.

The paper learns on the output of a block, run anew in every step. Here the loss is that of one linear, which
the hessian gives without a run, and learning starts from what GPTQ rounded. Of every row the better of both counts, on
tokens that took no part in learning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import Grid, to_quant_tensor
from outlierq.ops.held_out import without_rows
from outlierq.ops.search.refine import refit_scales
from outlierq.quantize.gptq import gptq
from outlierq.registry import quantizer

FAR = 0.45  # how far from its code a weight may begin: less than where the next code begins


@quantizer("signround", needs=("hessian", "rows"), copies=14, factors=True, paper="arXiv:2309.05516")
def signround(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    steps: Annotated[int, Ge(0)] = 200,
    tune: Literal["codes", "codes and scales"] = "codes and scales",
    step_size: Literal["sign", "adam"] = "adam",
    refine_passes: Annotated[int, Ge(0)] = 2,
) -> QuantTensor:
    """GPTQ, then codes that follow the signs of the gradient of tr((Q - W) H (Q - W)^T), where that helps.

    w: [out, in] float32. stats.rows: kept tokens, which are taken out of the hessian and judge each row. steps: 0 is
    gptq. tune: whether scales are fitted anew to learned codes. step_size: of the sign alone, or by Adam. Numbers other
    than integers with plain scales are rounded as by gptq.
    """
    start = gptq(w, stats, scheme, refine_passes=refine_passes)
    if not steps:
        return start
    if scheme.kind != "int" or scheme.scales != "plain" or scheme.vector > 1:
        note("learns integers with plain scales only: rounded as by gptq")
        return start
    hessian, held_out = without_rows(stats)
    grid = Grid(start.scale.float(), None if start.zero_point is None else start.zero_point.float(), scheme)
    codes = learned_codes(w, start.codes.float(), grid, hessian, steps, adam=step_size == "adam")
    fitted = refit_scales(w, codes, grid, hessian) if tune == "codes and scales" else grid
    return _better_rows(w, start, to_quant_tensor(codes, fitted), held_out)


def learned_codes(
    w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, steps: int, *, adam: bool
) -> torch.Tensor:
    """Codes [out, in] float32 with the least output error that any step saw, by row; never more than that of `codes`.

    The weight in units of its scale moves by (1 - step / steps) / steps against the gradient, a half in all, and is
    rounded in every step (straight-through).
    """
    scheme = grid.scheme
    scale, zero = grid.per_column(w.shape[1])
    zero = torch.zeros_like(scale) if zero is None else zero
    place = codes + (w / scale + zero - codes).clamp(-FAR, FAR)
    best, least = codes.clone(), torch.full((len(w),), torch.inf, device=w.device)
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(steps + 1):
        now = place.round().clamp_(scheme.code_min, scheme.code_max)
        change = (now - zero) * scale - w
        gradient = change @ hessian
        error = (gradient * change).sum(1)
        better = error < least
        best[better], least[better] = now[better], error[better]
        gradient *= scale
        if adam:
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.05)
            move = mean / square.sqrt().clamp(min=1e-30)
        else:
            move = gradient.sign()
        place.sub_(move, alpha=(1 - step / steps) / steps)
    return best


def _better_rows(w: torch.Tensor, one: QuantTensor, other: QuantTensor, rows: torch.Tensor) -> QuantTensor:
    """`one` with the rows of `other` that err less on inputs `rows` [n, in]."""
    lost = [(rows @ (made.dequantize() - w).T).square().sum(0) for made in (one, other)]
    better = (lost[1] < lost[0])[:, None]
    return replace(
        one, codes=torch.where(better, other.codes, one.codes), scale=torch.where(better, other.scale, one.scale)
    )
