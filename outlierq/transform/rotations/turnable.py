"""What methods that turn a model see of it: which rotations and scales would cancel, and what they cost on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from outlierq.ops.hadamard import Rotation

RESIDUAL, VALUES, SCALE = "residual", "values", "scale"

Turns = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Turnable:
    """A model on a text, as far as those methods know it.

    Turns are float64 tensors by name: "residual" [1, n, n], orthogonal, x -> x R for the stream between the blocks;
    "values.B.MODULE" [heads, d, d], alike, for each key-value head of what MODULE of block B writes; "scale.B.MODULE"
    [K] > 0, by which what MODULE reads is divided: behind the rotation for readers of the stream, before it for values.

    start: the turns that there can be, which change nothing. keeps_mean: whether "residual" must keep the all-ones
    vector (LayerNorm). rounds: whether any input is rounded; without that there is nothing to learn. batches: of text.
    loss: mean KL in nats per token of the model, inputs rounded behind their turns and weights as they are, on some
    batches. gradient: the same, and its gradient by the turns. moments: the second moments of what a rotation sees, in
    the rotation's shape. weights: W^T W over the linears that read it, alike.
    """

    start: Turns
    keeps_mean: bool
    rounds: bool
    batches: int
    loss: Callable[[Turns, Sequence[int]], float]
    gradient: Callable[[Turns, Sequence[int]], tuple[float, Turns]]
    moments: Callable[[str], torch.Tensor]
    weights: Callable[[str], torch.Tensor]

    def rotations(self, *, residual: bool, values: bool) -> list[str]:
        """Names of the rotations of these kinds."""
        kinds = {RESIDUAL: residual, VALUES: values}
        return [name for name in self.start if kinds.get(kind_of(name))]


def kind_of(name: str) -> str:
    """RESIDUAL, VALUES or SCALE."""
    return name.split(".", 1)[0]


def hadamard_turn(model: Turnable, name: str, seed: int) -> torch.Tensor:
    """The random Hadamard matrix that `rotate` would take for a rotation, in its shape; see `Rotation`."""
    heads, width, _ = model.start[name].shape
    if kind_of(name) == RESIDUAL:
        rotation = Rotation.of(width, seed, keeps_mean=model.keeps_mean)
    else:
        rotation = Rotation.of(width, (seed << 20) + int(name.split(".")[1]) + 1)
    return rotation.apply(torch.eye(width, dtype=torch.float64)).expand(heads, -1, -1).clone()
