"""Stage 4: choose a per-channel scale for one input group, and make it exact in the producer's storage dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import NumbersError, during
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats

if TYPE_CHECKING:
    from outlierq.registry import Method


def choose_scale(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None,
    steps: Sequence[tuple[Method, dict[str, Any]]],
    group: str,
) -> torch.Tensor:
    """The product of the scales that the transforms choose one after another, [in].

    w: [out, in] float32, the stacked linears. tie: [in] producer channel of every input channel, or None.
    """
    total = torch.ones(w.shape[1], device=w.device)
    for method, options in steps:
        with during(f"transform {method.name}", group):
            scale = method.function(w * total, stats.scaled(total), scheme, tie, **options)
            if not scale.isfinite().all() or (scale <= 0).any():
                raise NumbersError(f"{method.name} chose a scale that is not finite and positive")
            total = total * scale
    return total


def storable_scale(gain: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, offset: float) -> torch.Tensor:
    """The scale nearest to `scale` for which a folded gain is exact in its storage dtype.

    A norm's folded weight is stored in 16 bits; dividing the gain by that stored value gives the scale the consumers
    must carry, so that folding changes nothing at all. gain: [in] float32, the effective gain (weight + offset).
    Channels whose gain is 0 keep scale 1: nothing comes through them.
    """
    stored = ((gain / scale - offset).to(dtype).float() + offset).to(gain.dtype)
    usable = (gain != 0) & (stored != 0) & (stored.sign() == gain.sign())
    return torch.where(usable, gain / torch.where(usable, stored, torch.ones_like(stored)), torch.ones_like(gain))
