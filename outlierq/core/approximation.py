"""`Approximation`: what stands for a weight and what it costs, where no format holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Branch = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Approximation:
    """A weight as it would be decoded. weight: [out, in] float32. bits: stored bits per weight, all that it needs.

    branch: down [rank, in] and up [out, rank] float32, a path beside the weight whose input is not quantized; or None.
    """

    weight: torch.Tensor
    bits: float
    branch: Branch | None = None

    @property
    def whole(self) -> torch.Tensor:
        """[out, in] float32: the weight and its branch together."""
        return self.weight if self.branch is None else self.weight + self.branch[1] @ self.branch[0]

    def rows(self, start: int, stop: int) -> Approximation:
        """The output rows `start:stop` of a stack; its members share the down projection of the branch."""
        branch = None if self.branch is None else (self.branch[0], self.branch[1][start:stop])
        return replace(self, weight=self.weight[start:stop], branch=branch)
