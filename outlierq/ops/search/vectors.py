"""Rounding 8 weights at once, for codebooks whose codes stand for several weights: GPTQ's sweep and coordinate descent.

The sweep is that of `quantize/gptq.py` with vectors for columns (van Baalen et al. 2024, arXiv:2402.15319): what a
vector errs is e M e^T with M the inverse of its block of the inverse hessian of what is yet to come, and e U_bb^-1 is
pushed on. The nearest codeword is looked for under the diagonal of M.
"""

from __future__ import annotations

import torch

from outlierq.ops.codebooks import SIGNS, nearest_vectors
from outlierq.ops.grid import Grid

BLOCK = 128


def vector_order(importance: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[in] a permutation of columns that keeps the columns of a vector together: vectors by falling mean importance.

    importance: [in] diag H. order: the permutation that was asked for; where it is the columns' own it stays.
    """
    columns = torch.arange(len(importance), device=importance.device)
    if torch.equal(order, columns):
        return order
    vectors = torch.argsort(importance.view(-1, SIGNS).mean(1), descending=True, stable=True)
    return columns.view(-1, SIGNS)[vectors].flatten()


def sweep_vectors(w: torch.Tensor, grid: Grid, upper: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] float32 of a weight [out, in]. upper: [in, in] as in `sweep`, in an order of `vector_order`."""
    kind = grid.scheme.blocks
    scale = grid.per_column(w.shape[1])[0].T[order].contiguous()
    work = w.T[order].contiguous()  # [in, out]
    codes = torch.empty_like(work)
    for start in range(0, len(work), BLOCK):
        stop = min(start + BLOCK, len(work))
        errors = torch.empty_like(work[start:stop])
        for first in range(start, stop, SIGNS):
            part = slice(first, first + SIGNS)
            inverse = torch.linalg.solve_triangular(
                upper[part, part], torch.eye(SIGNS, device=w.device, dtype=upper.dtype), upper=True
            )
            codes[part] = nearest_vectors((work[part] / scale[part]).T, kind, inverse.square().sum(1)[None]).T
            error = inverse.T @ (work[part] - codes[part] * scale[part])
            errors[first - start : first - start + SIGNS] = error
            if first + SIGNS < stop:
                work[first + SIGNS : stop].addmm_(upper[part, first + SIGNS : stop].T, error, alpha=-1)
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
    kind, device = grid.scheme.blocks, w.device
    scale = grid.per_column(w.shape[1])[0].T[order].contiguous()
    ordered = hessian[order[:, None], order]
    code = codes.T[order].contiguous()
    value = code * scale
    residual = ordered @ (w.T[order] - value)  # [in, out]
    ridge = ordered.diagonal().mean().clamp(min=1e-30) * 1e-6 * torch.eye(SIGNS, device=device)
    for start in range(0, len(code), BLOCK):
        stop = min(start + BLOCK, len(code))
        moved = torch.zeros_like(code[start:stop])
        for first in range(start, stop, SIGNS):
            part = slice(first, first + SIGNS)
            curvature = ordered[part, part] + ridge
            target = value[part] + torch.linalg.solve(curvature, residual[part])
            new = nearest_vectors((target / scale[part]).T, kind, curvature.diagonal()[None]).T
            before, after = value[part] - target, new * scale[part] - target
            better = ((curvature @ after) * after).sum(0) < ((curvature @ before) * before).sum(0)
            code[part] = torch.where(better, new, code[part])
            step = torch.where(better, new * scale[part] - value[part], 0.0)
            moved[first - start : first - start + SIGNS] = step
            residual[first + SIGNS : stop].addmm_(ordered[part, first + SIGNS : stop].T, step, alpha=-1)
        if stop < len(code):
            residual[stop:].addmm_(ordered[start:stop, stop:].T, moved, alpha=-1)
    return _in_place(code, order)


def _in_place(code: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Codes [in, out] in an order as codes [out, in] in that of the columns."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return code[back].T.contiguous()
