"""Rounding to even steps between the least and the largest value."""

from __future__ import annotations

import torch


def rounded(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """Each row of the last axis in `bits` bits, a step and a zero point of its own; float32, any shape.

    clip: the step is so much of the one that holds every value.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    most = 2**bits - 1
    step = ((high - low) * clip / most).clamp(min=1e-12)
    zero = (-low * clip / step).round()
    done: torch.Tensor = ((x / step).round().add_(zero).clamp_(0, most) - zero) * step
    return done


def in_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """The last axis [..., n] cut into groups [..., n / size, size]; one group where it cannot be cut evenly."""
    size = size if x.shape[-1] % size == 0 else x.shape[-1]
    return torch.unflatten(x, -1, (-1, size))
