"""What learning by gradients shares: batches in turn, and steps by Adam."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

HELD_OUT = 8  # one of so many batches is held out of learning


def split(batches: int) -> tuple[list[int], list[int]]:
    """Which batches are learned on, and which are held out: every eighth, and one at least; of one batch none is."""
    count = max(1, batches // HELD_OUT)
    return list(range(batches - count)), list(range(batches - count, batches))


def in_turn(batches: Sequence[int], count: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`count` batches for every step, one at least and all at most, in a seeded order, each as often as any other."""
    count = min(max(1, count), len(batches))
    generator, waiting = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(steps):
        while len(waiting) < count:
            waiting += [batches[at] for at in torch.randperm(len(batches), generator=generator)]
        yield waiting[:count]
        del waiting[:count]


class Adam:
    """Directions of steps (arXiv:1412.6980) for one tensor of any shape.

    fresh: the part of a new gradient, and of its square, in their running means.
    """

    def __init__(self, like: torch.Tensor, fresh: tuple[float, float] = (0.1, 0.05)):
        self.fresh = fresh
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: torch.Tensor, number: int) -> torch.Tensor:
        """Against which a step goes, of the gradient's shape, in step `number` from 1."""
        of_mean, of_square = self.fresh
        self.mean.lerp_(gradient, of_mean)
        self.square.lerp_(gradient.square(), of_square)
        size = (self.square / (1 - (1 - of_square) ** number)).sqrt_().clamp_(min=1e-30)
        return (self.mean / (1 - (1 - of_mean) ** number)).div_(size)
