"""Linear algebra on hessians: damping and the inverse Cholesky factor that GPTQ walks along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from outlierq.core.errors import NumbersError

# Factors on the asked damping, tried in turn. Up to 50x (0.5 of the mean diagonal at the default 0.01).
DAMPING_LADDER = (1.0, 2.0, 5.0, 10.0, 50.0)
# Rows of a matrix that are copied at a time.
ROWS = 256

Factor = tuple[torch.Tensor, float]
_shared: ContextVar[dict[tuple[int, float], Factor] | None] = ContextVar("factors", default=None)


@contextmanager
def sharing_factors() -> Iterator[None]:
    """Inside, `inverse_cholesky` works out the factor of one tensor and damping once, and keeps it.

    For a method that is called for one part of its rows after another, with one hessian and one order of its columns.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def inverse_cholesky(hessian: torch.Tensor, damp: float, order: torch.Tensor | None = None) -> Factor:
    """Upper Cholesky factor U of (H + damp * mean(diag H) * I)^-1, and the damping that made it possible.

    hessian: [in, in] float32. order: [in] in which its rows and columns are taken, None as they are. The ladder is
    float32 at `damp`, float64 at `damp`, then float64 with more damping.
    NumbersError when no step of the ladder gives a positive definite matrix.
    """
    shared = _shared.get()
    if shared is None:
        return _climb(hessian, damp, order)
    key = id(hessian), damp
    if key not in shared:
        shared[key] = _climb(hessian, damp, order)
    return shared[key]


def damped_solve(hessian: torch.Tensor, right: torch.Tensor, damp: float) -> torch.Tensor:
    """(H + damp * mean(diag H) * I)^-1 B. hessian: [in, in]; right: B [in, n]; float32, solved in float64.

    NumbersError when the damped matrix is not positive definite.
    """
    matrix = hessian.double()
    matrix.diagonal().add_(damp * matrix.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise NumbersError(
            f"the hessian [{len(hessian)}, {len(hessian)}] is not positive definite with damping {damp:g}",
            hint="calibrate with more tokens, or raise `damp`",
        )
    return torch.cholesky_solve(right.double(), factor).float()


def _climb(hessian: torch.Tensor, damp: float, order: torch.Tensor | None) -> Factor:
    """The first step of the ladder that gives a factor.

    A step works in one matrix, from the damped hessian to the factor: at the width of a large model's feed-forward
    part each matrix takes a gigabyte. LAPACK works in place when the columns are contiguous.
    """
    mean = hessian.diagonal().mean().item()
    steps = [(torch.float32, damp), *((torch.float64, damp * factor) for factor in DAMPING_LADDER)]
    for dtype, level in steps:
        matrix = torch.empty(hessian.shape, dtype=dtype, device=hessian.device).T
        _take(matrix, hessian, order)
        matrix.diagonal().add_(level * mean)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        if torch.linalg.cholesky_ex(matrix, out=(matrix, failed))[1]:
            continue
        torch.cholesky_inverse(matrix, out=matrix)
        torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
        if not failed and matrix.isfinite().all():
            return matrix.float(), level
    raise NumbersError(
        f"the hessian [{hessian.shape[0]}, {hessian.shape[0]}] is not positive definite, even with damping "
        f"{steps[-1][1]:g} of its mean diagonal {mean:g}",
        hint="calibrate with more tokens, or add this layer to `quantize.ignore`",
    )


def _take(target: torch.Tensor, source: torch.Tensor, order: torch.Tensor | None) -> None:
    """Fill `target` with the rows and columns of `source` [n, n] in an order, some rows at a time."""
    for start in range(0, len(source), ROWS):
        part = slice(start, start + ROWS)
        target[part] = source[part] if order is None else source[order[part, None], order]
