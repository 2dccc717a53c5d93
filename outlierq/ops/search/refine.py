"""Refine a rounded weight: coordinate descent on the codes, closed-form refitting of the scales.

Both steps minimise the same objective as GPTQ, tr((Q - W) H (Q - W)^T), and neither can raise it: a code is changed
only to the best value given all others (the coordinate descent of QuantEase, Behdin et al. 2023, arXiv:2309.01885),
and the scales of a row are then the least-squares solution for its codes, kept where they help.
"""

from __future__ import annotations

from math import prod

import torch

from outlierq.ops.grid import Grid, in_groups, nearest_code
from outlierq.ops.search.level_fit import refit_levels
from outlierq.ops.search.vectors import descend_vectors

BLOCK = 128
# Elements of the products of a part of the rows with the hessian, in float32; about twice that is in use. So many stay
# in the cache, as long as the hessian is not read for a handful of rows; and never more than 128 MiB.
FIT_ELEMENTS, LEAST_ROWS, MOST_FIT_ELEMENTS = 1 << 21, 32, 1 << 25


def refine(
    w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, order: torch.Tensor, *, passes: int
) -> tuple[torch.Tensor, Grid]:
    """`passes` rounds of scale refitting and coordinate descent.

    w: [out, in]; codes: [out, in] float; hessian: [in, in]; order: [in] in which columns are visited.
    """
    for _ in range(passes):
        if grid.scheme.type is not None and grid.scheme.kind != "float":
            grid = refit_levels(w, codes, grid, hessian)
        elif grid.scheme.block is None:  # the scales of a block belong to many rows, which are not solved together here
            grid = refit_scales(w, codes, grid, hessian)
        if grid.scheme.vector > 1:
            codes = descend_vectors(w, codes, grid, hessian, order)
        else:
            codes = descend(w, codes, grid, hessian, order)
    return codes, grid


def row_errors(change: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """[out] output error of every row."""
    return ((change @ hessian) * change).sum(1)


def fitted_together(groups: int, columns: int) -> int:
    """Rows whose scales are refitted at a time. groups: scales of a row; columns: its weights."""
    each = groups * columns
    return max(1, min(max(LEAST_ROWS, FIT_ELEMENTS // each), MOST_FIT_ELEMENTS // each))


def refit_scales(w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> Grid:
    """The scales of all groups of a row, jointly: solve (C H C^T) s = C H w with C the row's codes by group.

    w, codes: [out, in]. hessian: [in, in]. Rows whose error does not fall (after rounding the scale to its storage
    dtype) keep their scales.
    """
    centred = in_groups(codes, grid.scheme)
    if grid.zero_point is not None:
        centred = centred - grid.zero_point[..., None]
    groups, columns = centred.shape[1:]
    by_group = hessian.view(groups, columns, -1)
    scale = grid.scale.clone()
    rows = fitted_together(groups, hessian.shape[0])
    # Made once: fresh memory for every part costs as much as the work on it, and the heap would keep holes of its size.
    room, products = torch.empty(2, groups * min(rows, len(w)) * hessian.shape[0], device=w.device)
    for start in range(0, len(w), rows):
        part = centred[start : start + rows]
        shape = groups, len(part), hessian.shape[0]
        # [groups, rows, in]: one group's share of C H
        weighted = torch.bmm(part.transpose(0, 1), by_group, out=room[: prod(shape)].view(shape))
        product = products[: prod(shape)].view(groups, len(part), groups, columns)
        gram = torch.mul(weighted.view_as(product), part, out=product).sum(-1).permute(1, 0, 2)
        target = torch.mul(weighted, w[start : start + rows], out=product.view(shape)).sum(-1).T
        ridge = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30) * 1e-6
        gram = gram + ridge[:, None, None] * torch.eye(groups, device=w.device)
        solved, failed = torch.linalg.solve_ex(gram, target)
        usable = (failed == 0)[:, None] & solved.isfinite()
        scale[start : start + rows] = torch.where(usable, solved, scale[start : start + rows])
    refitted = grid.with_scale(scale)
    grouped = in_groups(codes, grid.scheme)
    before = row_errors(grid.decode(grouped).view(w.shape) - w, hessian)
    after = row_errors(refitted.decode(grouped).view(w.shape) - w, hessian)
    return grid.where((after < before)[:, None], refitted)


def descend(
    w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """One pass of coordinate descent over the columns in `order` [in]; returns the new codes [out, in].

    With R = (W - Q) H, the best value of column j given all others is q_j + R_j / H_jj; it is rounded to the grid,
    and R loses (change of q_j) * H_j. Blocks of columns keep the update of the far columns a matrix product.
    """
    scheme = grid.scheme
    scale, zero_point = grid.per_column(w.shape[1])
    scale = scale.T[order].contiguous()
    zero_point = None if zero_point is None else zero_point.T[order].contiguous()
    ordered = hessian[order[:, None], order]
    curvature = ordered.diagonal().clamp(min=1e-30).tolist()
    code = codes.T[order].contiguous()
    value = code * scale if zero_point is None else (code - zero_point) * scale
    residual = ordered @ (w.T[order] - value)  # [in, out]
    for start in range(0, len(code), BLOCK):
        stop = min(start + BLOCK, len(code))
        moved = torch.empty_like(code[start:stop])
        for i in range(start, stop):
            zero = None if zero_point is None else zero_point[i]
            ratio = torch.add(value[i], residual[i], alpha=1 / curvature[i]).div_(scale[i])
            code[i] = nearest_code(ratio, zero, scheme)
            new = (ratio if zero is None else ratio.sub_(zero)).mul_(scale[i])
            step = torch.sub(new, value[i], out=moved[i - start])
            residual[i + 1 : stop].addr_(ordered[i, i + 1 : stop], step, alpha=-1)
        if stop < len(code):
            residual[stop:].addmm_(ordered[start:stop, stop:].T, moved, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return code[back].T.contiguous()
