"""Stable rank ||W||_F^2 / sigma_1^2: how many directions carry a weight. Rudelson and Vershynin 2007, J. ACM 54."""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError

VECTORS = 4
ROUNDS = 30
CLOSE = 1e-3


def stable_rank(weight: torch.Tensor) -> float:
    """1 for a rank-one matrix, n for an orthogonal one. weight: [out, in]; accurate to about 1 %."""
    wide = weight.float()
    power = wide.square().sum().item()
    if power == 0:
        raise StatsError("every weight is 0", hint="the checkpoint may be damaged or the layer unused")
    return power / largest_singular(wide) ** 2


def largest_singular(weight: torch.Tensor) -> float:
    """sigma_1 of W [out, in] by power iteration of W^T W on some seeded vectors, until it rises by less than 0.1 %."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(weight.shape[1], VECTORS, generator=generator).to(weight.device)
    best = 0.0
    for _ in range(ROUNDS):
        vectors, _ = torch.linalg.qr(vectors)
        images = weight @ vectors
        norm: float = torch.linalg.matrix_norm(images, 2).item()
        if norm <= best * (1 + CLOSE):
            break
        best = norm
        vectors = weight.T @ images
    return max(best, norm)
