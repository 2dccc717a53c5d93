"""AdaDim: groups of columns or groups of rows, whichever errs less. Heo et al. 2024, arXiv:2309.15531.

A loud input channel spoils the group that it lies in, in every row. With one scale for some rows of one column it
spoils only itself. No format stores such scales, so this is a study; its error ratio is a measure of `detect`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Gt

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.by_output import dimension_ratio, nearest, nearest_by_output, transposed_scheme
from outlierq.ops.grid import in_groups, minmax_grid
from outlierq.ops.solve import inverse_cholesky
from outlierq.quantize.gptq import gptq
from outlierq.quantize.studies.bits import grid_bits
from outlierq.registry import approximation


@approximation("adadim", needs=("hessian",), paper="arXiv:2309.15531")
def adadim(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    rounding: Literal["rtn", "gptq"] = "rtn",
    damp: Annotated[float, Gt(0)] = 0.01,
) -> Approximation:
    """Groups along inputs, unless rounding to nearest errs less with groups along outputs.

    w: [out, in] float32. rounding: `gptq` then sweeps with the groups that were chosen. Of equal errors, groups along
    inputs win: formats have them.
    """
    hessian = stats.need("hessian")
    by_output = dimension_ratio(w, hessian, scheme) < 1
    if not by_output and rounding == "gptq":
        done = gptq(w, stats, scheme, damp=damp, scale_search="minmax", refine_passes=0)
        return Approximation(done.dequantize(), done.bits_per_weight)
    if not by_output:
        return Approximation(nearest(w, scheme), scheme.bits + grid_bits(scheme, w.shape[1]))
    values = sweep_by_output(w, hessian, scheme, damp) if rounding == "gptq" else nearest_by_output(w, scheme)
    return Approximation(values, scheme.bits + grid_bits(transposed_scheme(scheme, len(w)), len(w)))


def sweep_by_output(w: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, damp: float) -> torch.Tensor:
    """The GPTQ loop where the scales of a column are those of its rows as they are when the sweep reaches it.

    w: [out, in] float32. A column's scales mix no columns, so the columns come in the order of diag H for free.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper, _ = inverse_cholesky(hessian, damp, order)
    work, values = w.T[order].contiguous(), torch.empty_like(w.T)
    across = transposed_scheme(replace(scheme, group_size=scheme.group_size or len(w)), len(w))
    for i in range(len(work)):
        column = work[i][None]
        values[order[i]] = minmax_grid(column, across).round(in_groups(column, across)).flatten()
        error = (work[i] - values[order[i]]) / upper[i, i]
        work[i + 1 :] -= torch.outer(upper[i, i + 1 :], error)
    return values.T.contiguous()
