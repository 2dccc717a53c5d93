"""SparseGPT: prune column by column, and let the columns still to come make up for it. arXiv:2301.00774."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import minmax_grid, nearest_code
from outlierq.ops.pruning import dropped, stored_bits, swept
from outlierq.ops.solve import inverse_cholesky
from outlierq.quantize.studies.bits import grid_bits
from outlierq.registry import approximation

BLOCK = 128


@approximation("sparsegpt", needs=("hessian",), paper="arXiv:2301.00774")
def sparsegpt(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5,
    pattern: Literal["rows", "2:4"] = "rows",
    rounds: bool = False,
    damp: Annotated[float, Gt(0)] = 0.01,
) -> Approximation:
    """Drop the weights with the least w^2 / U_jj^2, and push what is lost onto the columns to come, as GPTQ does.

    w: [out, in] float32. The mask is chosen for 128 columns at a time (`rows`: so many of each row), or for four as the
    sweep reaches them. rounds: also round what is left to the min-max grid of `scheme`, in the same sweep.
    """
    upper, _ = inverse_cholesky(stats.need("hessian"), damp)
    diagonal = upper.diagonal()

    def gone(columns: torch.Tensor, part: slice) -> torch.Tensor:
        return dropped((columns / diagonal[part]).square(), sparsity, pattern)

    values = swept(w, upper, gone, 4 if pattern == "2:4" else BLOCK, on_grid(w, scheme) if rounds else None)
    bits = stored_bits(sparsity, pattern, scheme.bits if rounds else 16.0)
    return Approximation(values, bits + (grid_bits(scheme, w.shape[1]) if rounds else 0.0))


def on_grid(w: torch.Tensor, scheme: QuantScheme) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Puts a column [out], by its number, onto the min-max grid of a weight [out, in]; zero is on every grid."""
    scales, zero_points = minmax_grid(w, scheme).per_column(w.shape[1])

    def rounded(column: torch.Tensor, index: int) -> torch.Tensor:
        scale, zero_point = scales[:, index], None if zero_points is None else zero_points[:, index]
        code = nearest_code(column / scale, zero_point, scheme)
        return (code if zero_point is None else code - zero_point) * scale

    return rounded
