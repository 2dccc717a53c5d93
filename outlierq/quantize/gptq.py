"""GPTQ: rounding with error compensation. Frantar et al. 2022, arXiv:2210.17323."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from outlierq.core.errors import NumbersError
from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import Grid, from_groups, in_groups, minmax_grid, nearest_code, to_quant_tensor
from outlierq.ops.search.refine import refine
from outlierq.ops.search.scale_search import search_grid
from outlierq.ops.search.vectors import sweep_vectors, vector_order
from outlierq.ops.solve import inverse_cholesky
from outlierq.registry import quantizer

BLOCK = 128


@quantizer("gptq", needs=("hessian",), copies=11, factors=True, paper="arXiv:2210.17323")
def gptq(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    damp: Annotated[float, Gt(0)] = 0.01,
    order: Literal["none", "activation", "group-aware"] = "activation",
    scale_search: Literal["minmax", "hessian"] = "hessian",
    refine_passes: Annotated[int, Ge(0)] = 2,
) -> QuantTensor:
    """Round column by column; push each column's error onto the columns still to come.

    Minimises tr((Q - W) H (Q - W)^T) (Eq. 1). U is the upper Cholesky factor of H^-1 (Step 3).
    w: [out, in] float32. stats.hessian: [in, in]. damp: fraction of mean(diag H) added to the diagonal.
    order: `activation` visits columns by falling diag H with the scales of their original groups (static groups: no
    g_idx); `group-aware` (arXiv:2505.14638) sorts columns inside groups, then the groups. scale_search: `hessian` takes
    for each group the scale with the least output error, `minmax` the one that just holds it. refine_passes: passes of
    coordinate descent and scale refitting after the sweep, each of which can only lower the error; 0 is plain GPTQ.
    """
    hessian = stats.need("hessian")
    grid = search_grid(w, scheme, hessian) if scale_search == "hessian" else minmax_grid(w, scheme)
    permutation = column_order(hessian.diagonal(), order, scheme.columns_per_group(w.shape[1]))
    if scheme.vector > 1:
        permutation = vector_order(hessian.diagonal(), permutation)
    upper = _factor(hessian, damp, permutation)
    if upper is None:
        return to_quant_tensor(from_groups(grid.encode(in_groups(w, scheme)), w.shape[1]), grid)
    codes = (sweep_vectors if scheme.vector > 1 else sweep)(w, grid, upper, permutation)
    del upper  # as large as the hessian, and not needed by what follows
    codes, grid = refine(w, codes, grid, hessian, permutation, passes=refine_passes)
    return to_quant_tensor(codes, grid)


def _factor(hessian: torch.Tensor, damp: float, order: torch.Tensor) -> torch.Tensor | None:
    """U of `inverse_cholesky`, or None when no damping helps; anything but the asked damping is noted."""
    try:
        upper, level = inverse_cholesky(hessian, damp, order)
    except NumbersError as error:
        note(f"rounded to nearest: {error.what}")
        return None
    if level > damp:
        note(f"damping raised from {damp:g} to {level:g} of the mean diagonal")
    return upper


def column_order(importance: torch.Tensor, order: str, columns: int) -> torch.Tensor:
    """Permutation in which columns are rounded. importance: [in] diag H; columns: width of a group."""
    if order == "activation":
        return torch.argsort(importance, descending=True, stable=True)
    if order == "group-aware":
        grouped = importance.view(-1, columns)
        inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
        groups = torch.argsort(grouped.amax(1), descending=True, stable=True)
        return (inside + torch.arange(len(grouped), device=inside.device)[:, None] * columns)[groups].flatten()
    return torch.arange(len(importance), device=importance.device)


def sweep(w: torch.Tensor, grid: Grid, upper: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The GPTQ loop (Algorithm 1) in blocks of 128 columns; returns float codes [out, in] in the original order.

    The working copy is transposed: a column is then one contiguous row, which is what makes this loop fast on a CPU.
    """
    scheme = grid.scheme
    scale, zero_point = grid.per_column(w.shape[1])
    work = w.T[permutation].contiguous()  # [in, out]
    scale = scale.T[permutation].contiguous()
    zero_point = None if zero_point is None else zero_point.T[permutation].contiguous()
    codes = torch.empty_like(work)
    diagonal = upper.diagonal().tolist()
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty_like(work[start:stop])
        for i in range(start, stop):
            zero = None if zero_point is None else zero_point[i]
            code = nearest_code(torch.div(work[i], scale[i]), zero, scheme)
            value = code * scale[i] if zero is None else (code - zero).mul_(scale[i])
            codes[i] = code
            error = torch.sub(work[i], value, out=errors[i - start]).div_(diagonal[i])
            if i + 1 < stop:
                work[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        if stop < len(work):
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return codes[inverse].T.contiguous()
