"""Linear algebra on hessians: damping and the Cholesky factor that GPTQ walks along.

GPTQ is usually written with U, the upper Cholesky factor of the inverse of H. Its inverse R = U^-1 is upper as well,
and H = R R^T: found from H alone by one decomposition that starts at the last column, in a third of the operations that
two decompositions and an inverse take, and in one matrix. What a column pulls on those after it is then
(W - Q) R, whose rows also give the output error, ||(W - Q) R||^2 = tr((W - Q) H (W - Q)^T).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch

from outlierq.core.errors import NumbersError
from outlierq.core.machine.threads import each_alone

# Factors on the asked damping, tried in turn. Up to 50x (0.5 of the mean diagonal at the default 0.01).
DAMPING_LADDER = (1.0, 2.0, 5.0, 10.0, 50.0)
# Columns that are decomposed together, and rows of a matrix that are worked on or copied at a time.
BLOCK, ROWS = 128, 1024


@dataclass(frozen=True)
class Factor:
    """H + damping * I = R R^T, for the columns of H in an order.

    upper: [in, in] float32, R on and above the diagonal; below it only the blocks of 128 on the diagonal are zero, the
    rest is undefined. order: [in], the column of H at each place. level: damping over the mean diagonal of H.
    """

    upper: torch.Tensor
    order: torch.Tensor
    level: float
    damping: float

    def inverse(self) -> torch.Tensor:
        """U = R^-1, the upper Cholesky factor of the inverse of H; zero below the diagonal."""
        ones = torch.eye(len(self.upper), device=self.upper.device)
        found: torch.Tensor = torch.linalg.solve_triangular(self.upper, ones, upper=True)
        return found

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """(H + damping * I)^-1 B for B [in, n], in the columns' own order."""
        half = torch.linalg.solve_triangular(self.upper, right[self.order], upper=True)
        solved = torch.empty_like(right)
        solved[self.order] = torch.linalg.solve_triangular(self.upper.T, half, upper=False)
        return solved

    def pivots(self) -> torch.Tensor:
        """[in] R_jj^2 in the columns' own order: what the squared rounding error of each counts in a sweep."""
        found = torch.empty_like(self.upper[0])
        found[self.order] = self.upper.diagonal().square()
        return found

    def swept(self, errors: torch.Tensor) -> torch.Tensor:
        """Q - W [n, in] of a sweep whose roundings of shifted weights err by `errors` [n, in]: (errors R_jj) R^-1."""
        pulled = errors[:, self.order] * self.upper.diagonal()
        found = torch.empty_like(errors)
        found[:, self.order] = torch.linalg.solve_triangular(self.upper, pulled, upper=True, left=False)
        return found

    def blocks(self, size: int, inside: slice | None = None) -> Iterator[slice]:
        """The columns, or those of a part, in blocks of `size`."""
        first, last = (0, len(self.upper)) if inside is None else (inside.start, inside.stop)
        return (slice(start, min(start + size, last)) for start in range(first, last, size))


_shared: ContextVar[dict[tuple[int, float, bytes], Factor | NumbersError] | None] = ContextVar("factors", default=None)


@contextmanager
def sharing_factors() -> Iterator[None]:
    """Inside, `factored` works out the factor of one tensor, damping and order once, and keeps it.

    For a method that is called for one part of its rows after another, with one hessian.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def factored(hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None) -> Factor:
    """R with H + damp * mean(diag H) * I = R R^T, or with more damping where that is not positive definite.

    hessian: [in, in] float32. order: [in] in which its rows and columns are taken, None as they are.
    NumbersError when no step of the ladder gives a positive definite matrix.
    """
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    shared = _shared.get()
    if shared is None:
        return _climb(hessian, damp, order)
    key = id(hessian), damp, order.cpu().numpy().tobytes()
    if key not in shared:
        try:
            shared[key] = _climb(hessian, damp, order)
        except NumbersError as error:
            shared[key] = error
    kept = shared[key]
    if isinstance(kept, NumbersError):
        raise kept
    return kept


def inverse_cholesky(
    hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """U with (H + level * mean(diag H) * I)^-1 = U^T U, upper, and the level; arguments and errors as `factored`."""
    factor = factored(hessian, damp, order)
    return factor.inverse(), factor.level


def _climb(hessian: torch.Tensor, damp: float, order: torch.Tensor) -> Factor:
    """The first step of the ladder that gives a factor.

    All is done in one float32 matrix: at the width of a large model's feed-forward part each takes a gigabyte. (Sums in
    float64 lose hardly less, 0.7 times, of a hessian that itself is known to float32.)
    """
    mean = hessian.diagonal().mean().item()
    matrix, levels = torch.empty_like(hessian), [damp * factor for factor in DAMPING_LADDER]
    for level in levels:
        _take(matrix, hessian, order)
        matrix.diagonal().add_(level * mean)
        if _decompose(matrix):
            return Factor(matrix, order, level, level * mean)
    raise NumbersError(
        f"the hessian [{hessian.shape[0]}, {hessian.shape[0]}] is not positive definite, even with damping "
        f"{levels[-1]:g} of its mean diagonal {mean:g}",
        hint="calibrate with more tokens, or add this layer to `quantize.ignore`",
    )


def _take(target: torch.Tensor, source: torch.Tensor, order: torch.Tensor) -> None:
    """Fill the upper half of `target` with the rows and columns of `source` [n, n] in an order."""
    for start in range(0, len(source), BLOCK):
        # Whole rows first: both at once takes five times as long.
        rows = source.index_select(0, order[start : start + BLOCK])
        target[start : start + BLOCK, start:] = rows.index_select(1, order[start:])


def _decompose(matrix: torch.Tensor) -> bool:
    """R in the upper half of `matrix` [n, n] instead of R R^T, block by block from the last; False when there is none.

    Every product is of fixed pieces in one thread each, so that any number of threads gives the same bits.
    """
    width = len(matrix)
    with each_alone(on_cpu=matrix.device.type == "cpu") as together:
        for start in reversed(range(0, width, BLOCK)):
            block, later = slice(start, min(start + BLOCK, width)), slice(start + BLOCK, width)
            together(partial(_subtract, matrix, block, later), range(0, block.stop, ROWS))
            corner = _corner(matrix[block, block])
            if corner is None:
                return False
            matrix[block, block] = corner
            inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner), device=corner.device), upper=True)
            together(partial(_divide, matrix, block, inverse), range(0, start, ROWS))
    return bool(matrix.diagonal().isfinite().all())


def _subtract(matrix: torch.Tensor, block: slice, later: slice, first: int) -> None:
    """Take what the later columns of R explain from some rows of a block of columns."""
    rows = slice(first, min(first + ROWS, block.stop))
    if later.start < later.stop:
        matrix[rows, block].addmm_(matrix[rows, later], matrix[block, later].T, alpha=-1)


def _divide(matrix: torch.Tensor, block: slice, inverse: torch.Tensor, first: int) -> None:
    """The block's columns of R for some rows above its corner. inverse: of the corner."""
    rows = slice(first, min(first + ROWS, block.start))
    matrix[rows, block] = matrix[rows, block] @ inverse.T


def _corner(square: torch.Tensor) -> torch.Tensor | None:
    """R of one block, of whose symmetric matrix the upper half is given; None when there is none.

    Read from its last row and column on, R is the lower factor that LAPACK finds.
    """
    backwards = (square.triu() + square.triu(1).T).flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(backwards)
    return None if failed else lower.flip(0, 1)
