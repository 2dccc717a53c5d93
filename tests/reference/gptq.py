"""GPTQ as the paper prints it (arXiv:2210.17323, Algorithm 1), one column at a time in float64."""

from __future__ import annotations

import itertools

import torch


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """H + damp * mean(diag H) * I, float64."""
    hessian = hessian.double()
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def textbook_codes(
    w: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    code_range: tuple[int, int],
    *,
    damp: float,
    order: list[int],
) -> torch.Tensor:
    """Codes [out, in] of the plain loop. scale, zero_point: [out, in], one value a weight. order: columns in turn.

    The inverse of the hessian that is left is formed anew for every column, as the paper derives it (Eq. 2), so not
    even the Cholesky factor is shared with the fast code.
    """
    left = w.double().clone()
    scale, zero_point = scale.double(), zero_point.double()
    codes = torch.empty_like(left)
    full = damped(hessian, damp)
    for position, column in enumerate(order):
        open_columns = order[position:]
        inverse = torch.linalg.inv(full[open_columns][:, open_columns])
        code = (left[:, column] / scale[:, column]).round() + zero_point[:, column]
        codes[:, column] = code.clamp(*code_range)
        value = (codes[:, column] - zero_point[:, column]) * scale[:, column]
        error = (left[:, column] - value) / inverse[0, 0]
        left[:, open_columns] -= torch.outer(error, inverse[0])
    return codes


def sweep_errors(change: torch.Tensor, hessian: torch.Tensor, damp: float, order: list[int]) -> torch.Tensor:
    """e_i of every (row, column) [out, in] in sweep order, recovered from the whole change Q - W = E U.

    U is the upper Cholesky factor of the inverse of the damped, reordered hessian.
    """
    full = damped(hessian, damp)[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(full), upper=True)
    return torch.linalg.solve_triangular(upper, change.double()[:, order], upper=True, left=False)


def best_by_brute_force(row: torch.Tensor, hessian: torch.Tensor, values: list[torch.Tensor]) -> float:
    """The least d H d^T of one row over every combination of grid values. values: the grid of each column."""
    hessian = hessian.double()
    choices = torch.tensor(list(itertools.product(*(v.double().tolist() for v in values))), dtype=torch.float64)
    change = choices - row.double()
    return ((change @ hessian) * change).sum(1).min().item()
