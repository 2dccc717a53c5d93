"""Which weights to drop: so many of all, of each row, or of every few neighbours; and letting the others make up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Pattern = Literal["rows", "2:4", "matrix"]


def dropped(scores: torch.Tensor, sparsity: float, pattern: Pattern) -> torch.Tensor:
    """Bool [out, in]: the lowest scores of every row, of the whole matrix, or the two lowest of every four neighbours
    along the input.

    scores: [out, in]. sparsity: 0..1, of `rows` and `matrix`; 2:4 is half. Of equal scores the earlier is dropped. A
    last group of fewer than four loses half of them, rounded down.
    """
    if pattern == "rows":
        return _lowest(scores, round(sparsity * scores.shape[1]))
    if pattern == "matrix":
        return _lowest(scores.reshape(1, -1), round(sparsity * scores.numel())).view_as(scores)
    whole = scores.shape[1] // 4 * 4
    of_four = _lowest(scores[:, :whole].reshape(-1, 4), 2).view(len(scores), whole)
    rest = scores[:, whole:]
    return torch.cat([of_four, _lowest(rest, rest.shape[1] // 2)], 1)


def _lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool: the `count` lowest of every row."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def swept(
    w: torch.Tensor,
    upper: torch.Tensor,
    gone: Callable[[torch.Tensor, slice], torch.Tensor],
    width: int,
    rounded: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Zeros where `gone` says so, column by column; what is lost goes onto the columns to come, as in GPTQ. [out, in].

    w: [out, in] float32. upper: U with H^-1 = U^T U, [in, in]. gone: from the columns of a slice as they are now, [out,
    columns], a bool for each; asked for `width` columns at a time. rounded: also puts a column [out] on its grid.
    """
    work, values = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[1], width):
        part = slice(start, min(start + width, w.shape[1]))
        dropped_here = gone(work[:, part], part)
        errors = torch.empty_like(work[:, part])
        for i in range(part.start, part.stop):
            left = work[:, i] if rounded is None else rounded(work[:, i], i)
            values[:, i] = left.masked_fill(dropped_here[:, i - part.start], 0.0)
            errors[:, i - part.start] = (work[:, i] - values[:, i]) / upper[i, i]
            work[:, i + 1 : part.stop] -= torch.outer(errors[:, i - part.start], upper[i, i + 1 : part.stop])
        work[:, part.stop :] -= errors @ upper[part, part.stop :]
    return values


def stored_bits(sparsity: float, pattern: Pattern, bits: float = 16.0) -> float:
    """Bits per weight of what is left at `bits` each, and of knowing where: a bit for each, or 2 for each that is left.

    The two cost the same at 2:4.
    """
    return bits * (0.5 if pattern == "2:4" else 1 - sparsity) + 1.0
