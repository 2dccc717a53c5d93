"""SparseGPT: prune column by column, and let the columns still to come make up for it. arXiv:2301.00774."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import minmax_grid, nearest_code
from outlierq.ops.pruning import dropped, stored_bits
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
    work, values = w.clone(), torch.empty_like(w)
    grid = minmax_grid(w, scheme).per_column(w.shape[1]) if rounds else None
    width = 4 if pattern == "2:4" else BLOCK
    for start in range(0, w.shape[1], width):
        part = slice(start, min(start + width, w.shape[1]))
        gone = dropped((work[:, part] / upper.diagonal()[part]).square(), sparsity, pattern)
        errors = torch.empty_like(work[:, part])
        for i in range(part.start, part.stop):
            left = work[:, i] if grid is None else _rounded(work[:, i], i, grid, scheme)
            values[:, i] = left.masked_fill(gone[:, i - part.start], 0.0)
            errors[:, i - part.start] = (work[:, i] - values[:, i]) / upper[i, i]
            work[:, i + 1 : part.stop] -= torch.outer(errors[:, i - part.start], upper[i, i + 1 : part.stop])
        work[:, part.stop :] -= errors @ upper[part, part.stop :]
    bits = stored_bits(sparsity, pattern, scheme.bits if rounds else 16.0)
    return Approximation(values, bits + (grid_bits(scheme, w.shape[1]) if rounds else 0.0))


def _rounded(
    column: torch.Tensor, index: int, grid: tuple[torch.Tensor, torch.Tensor | None], scheme: QuantScheme
) -> torch.Tensor:
    """A column [out] on its grid, scales and zero points [out, in]; zero is on every grid."""
    scale, zero_point = grid[0][:, index], None if grid[1] is None else grid[1][:, index]
    code = nearest_code(column / scale, zero_point, scheme)
    return (code if zero_point is None else code - zero_point) * scale
