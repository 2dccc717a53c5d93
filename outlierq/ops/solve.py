"""Linear algebra on hessians: damping and the inverse Cholesky factor that GPTQ walks along."""

from __future__ import annotations

import torch

from outlierq.core.errors import NumbersError

# Factors on the asked damping, tried in turn. Up to 50x (0.5 of the mean diagonal at the default 0.01).
DAMPING_LADDER = (1.0, 2.0, 5.0, 10.0, 50.0)


def inverse_cholesky(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of (H + damp * mean(diag H) * I)^-1, and the damping that made it possible.

    hessian: [in, in] float32. The ladder is float32 at `damp`, float64 at `damp`, then float64 with more damping.
    NumbersError when no step of the ladder gives a positive definite matrix.
    """
    mean = hessian.diagonal().mean().item()
    steps = [(torch.float32, damp), *((torch.float64, damp * factor) for factor in DAMPING_LADDER)]
    for dtype, level in steps:
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(level * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed and upper.isfinite().all():
            return upper.float(), level
    raise NumbersError(
        f"the hessian [{hessian.shape[0]}, {hessian.shape[0]}] is not positive definite, even with damping "
        f"{steps[-1][1]:g} of its mean diagonal {mean:g}",
        hint="calibrate with more tokens, or add this layer to `quantize.ignore`",
    )
