"""The matrix of low rank that takes most of an output error, in closed form."""

from __future__ import annotations

import torch

from outlierq.core.errors import NumbersError


def low_rank(change: torch.Tensor, hessian: torch.Tensor | None, rank: int, damp: float) -> tuple[torch.Tensor, ...]:
    """down [rank, in] and up [out, rank] whose product is nearest to `change` [out, in] in output, float32.

    Minimises tr((D - B A) H (D - B A)^T): with H + damp * mean(diag H) * I = R R^T and the singular values
    D R = U S V^T, B = U S and A = V^T R^-1 of the largest `rank` of them. Without a hessian [in, in], the weight error.
    rank: at most the smaller side. Both factors get half of every singular value, so that 16 bits serve both alike.
    """
    wide = change.double()
    factor = None if hessian is None else _factor(hessian.double(), damp)
    left, values, right = _largest(wide if factor is None else wide @ factor, rank)
    if factor is not None:
        right = torch.linalg.solve_triangular(factor.T, right.T, upper=True).T
    root = values.sqrt()
    return (right * root[:, None]).float(), (left * root).float()


def _factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Lower Cholesky factor [in, in] of the damped hessian."""
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise NumbersError("the hessian is not positive definite", hint="calibrate with more tokens, or raise `damp`")
    return factor


def _largest(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, rank], S [rank] and V^T [rank, in] of the largest singular values, by the gram of the smaller side."""
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _largest(matrix.T, rank)
        return left.T, values, right.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    left = vectors[:, -rank:].flip(1)
    values = squares[-rank:].flip(0).clamp(min=0).sqrt()
    inverse = torch.where(values > 0, 1 / values, torch.zeros_like(values))
    return left, values, (left.T @ matrix) * inverse[:, None]
