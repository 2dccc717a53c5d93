"""Wanda: drop the weights with the smallest |W| times the norm of their input. Sun et al. 2023, arXiv:2306.11695."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.pruning import dropped, stored_bits
from outlierq.registry import approximation


@approximation("wanda", needs=("sum_sq",), paper="arXiv:2306.11695")
def wanda(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5,
    pattern: Literal["rows", "2:4"] = "rows",
    score: Literal["activation", "magnitude"] = "activation",
) -> Approximation:
    """Zeros in the place of the weights of a row that matter least; what is left stays as it is.

    w: [out, in] float32. score: `activation` is |W_ij| sqrt(sum x_j^2), `magnitude` is |W_ij|. `scheme` is not asked.
    """
    loudness = stats.need("sum_sq").float().sqrt() if score == "activation" else w.new_ones(w.shape[1])
    gone = dropped(w.abs() * loudness, sparsity, pattern)
    return Approximation(w.masked_fill(gone, 0.0), stored_bits(sparsity, pattern))
