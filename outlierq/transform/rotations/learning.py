"""Rotations that learn: steps on the orthogonal matrices, judged on text that no gradient saw.

A gradient G by R becomes the skew matrix A = G R^T - R G^T, and a step of it the rotation (I + A / 2)^-1 (I - A / 2) R,
Cayley's transform: orthogonal to rounding, however large the step is (Li et al. 2020, arXiv:2002.01113). Momentum and
size are Adam's, of whole matrices: A's entries together have one size, or those without a signal would go as far.
Scales move by Adam in their logarithm. Where held-out text finds that it became much worse, learning goes on from the
best so far with shorter steps: how far a model lets itself be turned at once is not known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from outlierq.core.errors import NumbersError, RecipeError
from outlierq.core.notes import note
from outlierq.ops.search.descent import Adam, in_turn, split
from outlierq.transform.rotations.turnable import RESIDUAL, SCALE, Turnable, Turns, kind_of

FRESH, FRESH_SIZE = 0.1, 0.01  # of a gradient, and of its square, in their running means
TOGETHER = 2  # batches of about 1,000 tokens in a step
NARROW = 128  # channels: wider matrices take smaller entries of A for as large an angle, which grows with sqrt(n)
LOOKS, FEW = 8, 4  # how often held-out text is looked at; fewer steps are none to judge by
ASTRAY = 1.1  # over the least KL so far: from there learning goes back to it, with shorter steps
# By how much. A Hadamard matrix makes all channels of a huge token equal, which integers hold nearly without error; any
# turn spoils that (docs/what-we-learned.md), scales less.
LESS_TURN, LESS_SCALE = 1 / 16, 1 / 4


@dataclass(frozen=True)
class Pace:
    """steps: how many. turn, scale: the largest steps, of the entries of A (of up to NARROW channels)
    and of log s; they fall to nothing, and faster where they lead astray. seed: of the order of batches.
    """

    steps: int
    turn: float
    scale: float = 0.0
    seed: int = 0


def learn(model: Turnable, starts: Mapping[str, Turns], pace: Pace) -> Turns:
    """The turns with the least KL on held-out batches, of those that were tried on the way from the best start.

    starts: by what they are called; turns of the shapes of `model.start`. Doing nothing is always among them. What was
    measured is noted. RecipeError where no input is rounded, or there is nothing to turn.
    """
    if not model.rounds:
        raise RecipeError(
            "rotations learn against the rounding of inputs, and this recipe rounds none",
            hint="set `quantize.activations`, or use `rotate` or `klt`, which learn nothing",
        )
    learning, held_out = split(model.batches)
    names = next(iter(starts.values())).keys()
    tried = {"as it is": {name: model.start[name] for name in names}, **starts}
    losses = {title: model.loss(turns, held_out) for title, turns in tried.items()}
    title = min(losses, key=losses.__getitem__)
    state = _State({name: each.clone() for name, each in tried[title].items()}, model.keeps_mean, losses[title], pace)
    for number, batches in enumerate(in_turn(learning, TOGETHER, pace.steps, pace.seed)):
        try:
            state.step(model, batches, 1 - number / pace.steps)
        except NumbersError as error:
            note(f"stopped at step {number}: {error.what}")
            break
        if state.number % max(FEW, pace.steps // LOOKS) == 0 or state.number == pace.steps:
            state.look(model.loss(state.turns, held_out))
    said = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
    note(f"KL of rounded inputs on held-out text: {said}; learned from {title} {state.least:.4g}")
    return state.best


@dataclass
class _State:
    """Where learning is. least: KL on held-out text of the best turns so far. pace: of the steps to come. number: of
    steps; since: of those with the present moves.
    """

    turns: dict[str, torch.Tensor]
    keeps_mean: bool
    least: float
    pace: Pace
    number: int = 0
    since: int = 0
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    moves: dict[str, _Move] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.best = dict(self.turns)
        self._start()

    def _start(self) -> None:
        """Moves without a past."""
        self.since = 0
        for name, each in self.turns.items():
            self.moves[name] = _Scaling(each) if kind_of(name) == SCALE else _Turning(each, self._keeps(name))

    def _keeps(self, name: str) -> bool:
        """Whether a rotation must keep the all-ones vector."""
        return self.keeps_mean and kind_of(name) == RESIDUAL

    def step(self, model: Turnable, batches: Sequence[int], left: float) -> None:
        """One step against the gradient. left: its size beside the largest. NumbersError when it is not finite."""
        loss, gradients = model.gradient(self.turns, batches)
        if not math.isfinite(loss) or not all(bool(each.isfinite().all()) for each in gradients.values()):
            raise NumbersError("the gradient is not finite")
        self.number, self.since = self.number + 1, self.since + 1
        for name, move in self.moves.items():
            size = left * (self.pace.scale if kind_of(name) == SCALE else self.pace.turn)
            self.turns[name] = move.moved(self.turns[name], gradients[name].double(), size, self.since)

    def look(self, loss: float) -> None:
        """Keep what there is where it is the best on held-out text; far above that go back to it, for shorter steps."""
        if loss < self.least:
            self.least, self.best = loss, dict(self.turns)
        elif not loss <= ASTRAY * self.least:
            turn, scale = LESS_TURN * self.pace.turn, LESS_SCALE * self.pace.scale
            self.turns, self.pace = dict(self.best), replace(self.pace, turn=turn, scale=scale)
            self._start()


class _Turning:
    """Steps of rotations [parts, n, n]."""

    def __init__(self, like: torch.Tensor, keeps_mean: bool):
        self.mean, self.size = torch.zeros_like(like), torch.zeros_like(like[:, :1, :1])
        self.keeps_mean = keeps_mean

    def moved(self, turn: torch.Tensor, gradient: torch.Tensor, size: float, number: int) -> torch.Tensor:
        """The rotations after step `number`, [parts, n, n]. gradient: by them, alike."""
        skew = skew_of(turn, gradient)
        if self.keeps_mean:
            skew = without_mean(skew)
        self.mean.lerp_(skew, FRESH)
        self.size.lerp_(skew.square().mean((-1, -2), keepdim=True), FRESH_SIZE)
        length = (self.size / (1 - (1 - FRESH_SIZE) ** number)).sqrt().clamp_(min=1e-30)
        size *= min(1.0, math.sqrt(NARROW / turn.shape[-1]))
        return cayley_step(turn, self.mean * (size / (1 - (1 - FRESH) ** number)) / length)


class _Scaling:
    """Steps of scales [K]."""

    def __init__(self, like: torch.Tensor):
        self.adam = Adam(like, (FRESH, FRESH_SIZE))

    def moved(self, scale: torch.Tensor, gradient: torch.Tensor, size: float, number: int) -> torch.Tensor:
        """The scales after step `number`, [K]. gradient: by them, [K]."""
        return scale * (-size * self.adam.direction(gradient * scale, number)).exp()


_Move = _Turning | _Scaling


def skew_of(turn: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient by rotations [..., n, n] within the orthogonal matrices: A = G R^T - R G^T, skew, alike."""
    product = gradient @ turn.mT
    return product - product.mT


def without_mean(skew: torch.Tensor) -> torch.Tensor:
    """Skew matrices [..., n, n] that leave the all-ones vector alone."""
    rows = skew - skew.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def cayley_step(turn: torch.Tensor, skew: torch.Tensor) -> torch.Tensor:
    """(I + A / 2)^-1 (I - A / 2) R for rotations R and skew A, both [..., n, n]: orthogonal to rounding."""
    half = skew / 2
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    stepped: torch.Tensor = torch.linalg.solve(one + half, (one - half) @ turn)
    return stepped
