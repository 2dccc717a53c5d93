"""Which weights of each row to drop: so many of the row, or so many of every few neighbours."""

from __future__ import annotations

from typing import Literal

import torch

Pattern = Literal["rows", "2:4"]


def dropped(scores: torch.Tensor, sparsity: float, pattern: Pattern) -> torch.Tensor:
    """Bool [out, in]: the lowest scores of every row, or the two lowest of every four neighbours along the input.

    scores: [out, in]. sparsity: 0..1, of `rows`; 2:4 is half. Of equal scores the earlier is dropped. A last group of
    fewer than four loses half of them, rounded down.
    """
    if pattern == "rows":
        return _lowest(scores, round(sparsity * scores.shape[1]))
    whole = scores.shape[1] // 4 * 4
    of_four = _lowest(scores[:, :whole].reshape(-1, 4), 2).view(len(scores), whole)
    rest = scores[:, whole:]
    return torch.cat([of_four, _lowest(rest, rest.shape[1] // 2)], 1)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool: the `count` lowest of every row."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def stored_bits(sparsity: float, pattern: Pattern, bits: float = 16.0) -> float:
    """Bits per weight of what is left at `bits` each, and of knowing where: a bit for each, or 2 for each that is left.

    The two cost the same at 2:4.
    """
    return bits * (0.5 if pattern == "2:4" else 1 - sparsity) + 1.0
