"""Stage 4: choose scale and shift of one input group, and make them exact in the producer's storage dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import NumbersError, during
from outlierq.core.move import Move
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats

if TYPE_CHECKING:
    from outlierq.registry import Method


def choose_move(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None,
    steps: Sequence[tuple[Method, dict[str, Any]]],
    group: str,
    *,
    shiftable: bool = False,
) -> Move:
    """What the transforms choose one after another, as one move.

    w: [out, in] float32, the stacked linears. tie: [in] producer channel of every input channel, or None.
    shiftable: a shift can be absorbed, too; only methods that can use one are told.
    """
    total = Move(torch.ones(w.shape[1], device=w.device))
    for method, options in steps:
        with during(f"transform {method.name}", group):
            left = stats if total.shift is None else stats.shifted(total.shift)
            told = (shiftable,) if method.shifts else ()
            result = method.function(w * total.scale, left.scaled(total.scale), scheme, tie, *told, **options)
            move = Move.of(result)
            _check(move, method.name, shiftable)
            total = _agreed(total.then(move), tie)
    return total


def _agreed(move: Move, tie: torch.Tensor | None) -> Move:
    """The move with exactly one scale and shift per producer: vectorised arithmetic may differ in the last bit."""
    if tie is None:
        return move

    def one(values: torch.Tensor) -> torch.Tensor:
        by_producer = values.new_zeros(int(tie.max()) + 1)
        by_producer[tie] = values
        if not torch.allclose(by_producer[tie], values, rtol=1e-5, atol=1e-6):
            raise NumbersError("channels that share a producer channel were to be moved differently")
        return by_producer[tie]

    return Move(one(move.scale), None if move.shift is None else one(move.shift))


def _check(move: Move, method: str, shiftable: bool) -> None:
    """NumbersError for a scale or a shift that cannot be carried out."""
    if not move.scale.isfinite().all() or (move.scale <= 0).any():
        raise NumbersError(f"{method} chose a scale that is not finite and positive")
    if move.shift is not None and not (shiftable and move.shift.isfinite().all()):
        raise NumbersError(f"{method} chose a shift that is not finite, or that nothing can absorb")


def storable_scale(gain: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, offset: float) -> torch.Tensor:
    """The scale nearest to `scale` for which a folded gain is exact in its storage dtype.

    A norm's folded weight is stored in 16 bits; dividing the gain by that stored value gives the scale the consumers
    must carry, so that folding changes nothing at all. gain: [in] float32, the effective gain (weight + offset).
    Channels whose gain is 0 keep scale 1: nothing comes through them.
    """
    stored = ((gain / scale - offset).to(dtype).float() + offset).to(gain.dtype)
    usable = (gain != 0) & (stored != 0) & (stored.sign() == gain.sign())
    return torch.where(usable, gain / torch.where(usable, stored, torch.ones_like(stored)), torch.ones_like(gain))


def storable_shift(bias: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The shift nearest to `shift` for which the producer's new bias, (bias - shift) / scale, is exact in its dtype.

    bias, shift, scale: [in] float32, the bias by input channel.
    """
    stored = ((bias - shift) / scale).to(dtype).to(bias.dtype)
    return bias - stored * scale
