"""`Move`: what a transform does to one linear input, x' = (x - shift) / scale, per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Largest relative change in float32 by a step that must change nothing: of a block's or model's output by a fold or a
# rotation, of a weight by a move. Right ones cause 1e-6 in tests, wrong ones 0.1.
UNCHANGED = 1e-4


@dataclass(frozen=True)
class Move:
    """The input of a group of linears becomes (x - shift) / scale; the linears become W * scale and b + W shift.

    scale: [in] > 0. shift: [in], or None where nothing can carry one.
    """

    scale: torch.Tensor
    shift: torch.Tensor | None = None

    @classmethod
    def of(cls, result: torch.Tensor | Move) -> Move:
        """What a transform returns: a scale [in] alone, or a move."""
        return result if isinstance(result, Move) else cls(result)

    def then(self, later: Move) -> Move:
        """This move and `later`, which was chosen for what this one leaves, as one."""
        shift = self.shift
        if later.shift is not None:
            moved = later.shift * self.scale
            shift = moved if shift is None else shift + moved
        return Move(self.scale * later.scale, shift)
