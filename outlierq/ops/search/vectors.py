"""Rounding several weights at once: GPTQ's sweep and coordinate descent for vectors of codebooks, and for pairs.

The sweep is that of `quantize/gptq.py` with vectors for columns (van Baalen et al. 2024, arXiv:2402.15319): what a
vector errs is e M e^T with M the inverse of its block of the inverse hessian of what is yet to come, and e U_bb^-1 is
pushed on. The nearest codeword is looked for under the diagonal of M, the nearest outlier-victim pair under M itself.
"""

from __future__ import annotations

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.codebooks import nearest_vectors
from outlierq.ops.grid import Grid
from outlierq.ops.outlier_victim import nearest_pairs

BLOCK = 128


def vector_order(importance: torch.Tensor, order: torch.Tensor, together: int) -> torch.Tensor:
    """[in] a permutation of columns that keeps those that are rounded together: by falling mean importance.

    importance: [in] diag H. order: the permutation that was asked for; where it is the columns' own it stays.
    """
    columns = torch.arange(len(importance), device=importance.device)
    if torch.equal(order, columns):
        return order
    vectors = torch.argsort(importance.view(-1, together).mean(1), descending=True, stable=True)
    return columns.view(-1, together)[vectors].flatten()


def _nearest(
    ratio: torch.Tensor, scheme: QuantScheme, curvature: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """Float32 codes of `ratio` [n, together]. curvature: [together, together], of errors; importance: its diagonal."""
    if scheme.kind == "outlier-victim":
        return nearest_pairs(ratio, curvature[None])
    return nearest_vectors(ratio, scheme.blocks, importance[None])


def sweep_vectors(w: torch.Tensor, grid: Grid, upper: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] float32 of a weight [out, in]. upper: [in, in] as in `sweep`, in an order of `vector_order`."""
    scheme, size = grid.scheme, grid.scheme.together
    scale = grid.per_column(w.shape[1])[0].T[order].contiguous()
    work = w.T[order].contiguous()  # [in, out]
    codes = torch.empty_like(work)
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty_like(work[start:stop])
        for first in range(start, stop, size):
            part = slice(first, first + size)
            inverse = torch.linalg.solve_triangular(
                upper[part, part], torch.eye(size, device=w.device, dtype=upper.dtype), upper=True
            )
            codes[part] = _nearest((work[part] / scale[part]).T, scheme, inverse @ inverse.T, inverse.square().sum(1)).T
            error = inverse.T @ (work[part] - codes[part] * scale[part])
            errors[first - start : first - start + size] = error
            if first + size < stop:
                work[first + size : stop].addmm_(upper[part, first + size : stop].T, error, alpha=-1)
        if stop < len(work):
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return _in_place(codes, order)


def descend_vectors(
    w: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """One pass of coordinate descent over vectors; returns the new codes [out, in]. No step raises the error.

    With R = (W - Q) H, the best value of a vector given all others is q + R_b H_bb^-1; the nearest codeword under the
    diagonal of H_bb takes its place where the whole H_bb agrees.
    """
    scheme, size = grid.scheme, grid.scheme.together
    scale = grid.per_column(w.shape[1])[0].T[order].contiguous()
    ordered = hessian[order[:, None], order]
    code = codes.T[order].contiguous()
    value = code * scale
    residual = ordered @ (w.T[order] - value)  # [in, out]
    ridge = ordered.diagonal().mean().clamp(min=1e-30) * 1e-6 * torch.eye(size, device=w.device)
    for start in range(0, len(code), BLOCK):
        stop = min(start + BLOCK, len(code))
        moved = torch.zeros_like(code[start:stop])
        for first in range(start, stop, size):
            part = slice(first, first + size)
            curvature = ordered[part, part] + ridge
            target = value[part] + torch.linalg.solve(curvature, residual[part])
            new = _nearest((target / scale[part]).T, scheme, curvature, curvature.diagonal()).T
            before, after = value[part] - target, new * scale[part] - target
            better = ((curvature @ after) * after).sum(0) < ((curvature @ before) * before).sum(0)
            code[part] = torch.where(better, new, code[part])
            step = torch.where(better, new * scale[part] - value[part], 0.0)
            moved[first - start : first - start + size] = step
            residual[first + size : stop].addmm_(ordered[part, first + size : stop].T, step, alpha=-1)
        if stop < len(code):
            residual[stop:].addmm_(ordered[start:stop, stop:].T, moved, alpha=-1)
    return _in_place(code, order)


def _in_place(code: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes [in, out] in an order as codes [out, in] in that of the columns."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return code[back].T.contiguous()
