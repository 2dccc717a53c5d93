"""Clipping search: the scale of a static activation quantizer with the least output error.

The error of rounding an input x to Q(x) is ||(Q(x) - x) W^T||^2 = d G d^T with d = Q(x) - x and G = W^T W, so all
linears that read the input are judged by one matrix. A scale below that of the largest input clips; it pays where few
values are far larger than the rest. The idea of choosing a clipping threshold by its error is that of Banner et al.
2019 (arXiv:1810.05723); here the error is that of the layer's output, as in the scale search of the weights.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.scheme import ActivationScheme
from outlierq.core.stats import InputStats
from outlierq.ops.activations import fake_quantize, unit_that_holds
from outlierq.ops.precision import matmul_operands

# Shares of the largest |x|: half powers of two down to 2^-8, then eighths of a power around the best one.
COARSE = tuple(2 ** (-step / 2) for step in range(1, 17))
FINE = tuple(2 ** (step / 8) for step in (-3, -2, -1, 1, 2, 3))


def weighed_rows(stats: InputStats) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, K] float32 and how many calibration tokens each stands for, [n].

    The reservoir stands for all tokens but the first ones of sequences. Those are few and far from the rest, a sample
    may miss them all; they are counted apart, each once. Counting them more often, as the hessian does for attention
    sinks, widens the static scales for their sake and costs all other tokens more (docs/what-we-learned.md).
    """
    rows = stats.need("rows").float()
    if not len(rows):
        raise StatsError("the statistics hold no rows of the input", hint="calibrate again")
    first = stats.first_rows
    if first is None or not len(first):
        return rows, torch.full((len(rows),), stats.tokens / len(rows), device=rows.device)
    others = torch.full((len(rows),), max(0, stats.tokens - len(first)) / len(rows), device=rows.device)
    weights = torch.cat([others, torch.ones(len(first), device=rows.device)])
    return torch.cat([rows, stats.need("first_rows").float()]), weights


def static_scale(
    weight: torch.Tensor,
    stats: InputStats,
    scheme: ActivationScheme,
    scale_dtype: torch.dtype,
    *,
    search: bool = True,
) -> torch.Tensor:
    """The scale [1] of a static per-tensor quantizer for the input of `weight` [out, in], in its storage dtype.

    weight: all linears that read the input, stacked, as they were quantized. Without `search` the scale just holds the
    largest input seen; with it, no candidate has a smaller output error, so it is never worse than that one on the kept
    rows. StatsError when the statistics hold no rows; NumbersError when they or the scale are not finite. Of two-level
    scales it is the float32 unit under which the largest input seen has the largest E4M3 scale; that is not searched,
    since values of other blocks do not depend on it.
    """
    largest = stats.need("abs_max").max()
    if stats.first_abs_max is not None:  # also where first tokens are left out of all other statistics
        largest = largest.maximum(stats.need("first_abs_max").max())
    if scheme.scales == "two-level":
        return _stored(unit_that_holds(largest, scheme), torch.float32)
    full = torch.where(largest > 0, largest / scheme.code_max, torch.ones_like(largest)).reshape(1)
    if not search or not largest:
        return _stored(full, scale_dtype)
    error = _OutputError(weight, *weighed_rows(stats), scheme)
    best = _stored(full, scale_dtype)
    for shares in (COARSE, FINE):
        best = min((_stored(best * share, scale_dtype) for share in (1.0, *shares)), key=error.roughly)
    full = _stored(full, scale_dtype)
    return best if error.exactly(best) < error.exactly(full) else full


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as it will be read back."""
    stored = scale.to(dtype)
    if not stored.isfinite().all() or (stored <= 0).any():
        raise NumbersError(f"the input scale {scale.item():g} cannot be stored as {dtype}")
    return stored


class _OutputError:
    """sum over rows of weight * ||(Q(x) - x) W^T||^2, as a function of the scale."""

    def __init__(self, weight: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, scheme: ActivationScheme):
        self.rows, self.counts, self.scheme = rows.to(weight.device), counts.to(weight.device), scheme
        # Through G when there are more outputs than inputs, directly otherwise: whichever is the smaller product.
        self.by_gram = len(weight) > weight.shape[1]
        self.matrix = weight.T @ weight if self.by_gram else weight.T

    def exactly(self, scale: torch.Tensor) -> float:
        """In float32."""
        change = fake_quantize(self.rows, self.scheme, scale).sub_(self.rows)
        moved = change @ self.matrix
        return ((moved * (change if self.by_gram else moved)).sum(1) * self.counts).sum().item()

    def roughly(self, scale: torch.Tensor) -> float:
        """Ranking candidates needs no more than bfloat16 operands."""
        with matmul_operands(torch.bfloat16):
            return self.exactly(scale)
