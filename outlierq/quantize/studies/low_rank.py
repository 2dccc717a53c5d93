"""A branch of low rank in 16 bits beside low-bit weights: LoRC of ZeroQuant-V2 (arXiv:2303.08302), and SVDQuant.

LoRC adds what rounding lost, as far as a low rank holds it. SVDQuant (Li et al. 2024, arXiv:2411.05007) rounds what the
branch leaves over, and takes turns. Either way the branch is the closed form that minimises the output error.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.errors import output_error
from outlierq.ops.low_rank import low_rank
from outlierq.quantize.gptq import gptq
from outlierq.registry import approximation

DAMP = 0.01  # of the mean diagonal, as in GPTQ


@approximation("low_rank", needs=("hessian",), paper="arXiv:2303.08302")
def with_branch(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    rank: Annotated[int, Ge(0)] = 32,
    rounds: Annotated[int, Ge(1)] = 1,
    start: Literal["rounding", "branch"] = "rounding",
    weigh: bool = True,
) -> Approximation:
    """Round, put what is lost into a branch of `rank`, round the rest anew, and so on; the best round counts.

    w: [out, in] float32, or a stack of linears with one input, which then share the down projection. rank: 0 is plain
    rounding; no more than the smaller side is used. start: `branch` first takes the largest singular values of the
    weight itself, as SVDQuant does. weigh: by the hessian; otherwise the weight error is approximated (plain LoRC).
    """
    hessian = stats.need("hessian")
    rank = min(rank, *w.shape)
    judged = hessian if weigh else None
    down, up = low_rank(w, judged, rank, DAMP) if start == "branch" and rank else (w.new_zeros(0, w.shape[1]), None)
    best, least = None, float("inf")
    for _ in range(rounds):
        rest = w if up is None else w - up @ down
        quantized = gptq(rest, stats, scheme)
        dense = quantized.dequantize()
        if rank:
            down, up = (each.bfloat16().float() for each in low_rank(w - dense, judged, rank, DAMP))
        branch = None if up is None else (down, up)
        bits = quantized.bits_per_weight + 16 * rank * sum(w.shape) / w.numel()
        made = Approximation(dense, bits, branch)
        error = output_error(made.whole - w, hessian).item()
        if error < least:
            best, least = made, error
    assert best is not None, "no round"
    return best
