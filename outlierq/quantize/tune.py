"""Tuning what is continuous in a finished checkpoint end to end, with its codes frozen. E2E-QP of EfficientQAT, Chen et
al. 2024, arXiv:2407.11062, with the divergence from the original as the loss, as mlx-lm's DWQ has it.

Scales, gains of norms and biases move relatively to what they are, by Adam, against the gradient of KL(original ||
tuned). What counts is text that no gradient saw, judged with every number rounded to the dtype that it is stored in: of
all states that were looked at the best on it is taken, and that is the start where tuning did not help. Adam's steps do
not shrink with the gradient, so the late states are averaged, and noise of about step_size x sqrt(steps) stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from outlierq.core.errors import NumbersError
from outlierq.ops.search.descent import Adam, in_turn, split

FRESH = (0.1, 0.01)  # of a gradient and of its square in their running means: gradients of few tokens are noisy
WARM_UP = 0.1  # the part of all steps in which they grow
LAST = 0.05  # the last step, beside the largest: they fall along a cosine
LATE = 0.6  # behind this part of all steps states are averaged
LOOKS = 8  # how often the divergence on held-out text is looked at
FEW = 4  # steps: no fewer to warm up in, nor between two looks, as Adam's first ones follow noise

Changes = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Tunable:
    """A model and text, as far as tuning knows them. Changes are relative, by name, each of any shape; 0 is the start.

    start: all of them, 0. batches: how many there are of text. loss: mean KL in nats per token of a state on some
    batches. gradient: the same, and its gradient by the changes; NumbersError where there is none. rounded: the changes
    that are left when every number is stored in its own dtype.
    """

    start: Changes
    batches: int
    loss: Callable[[Changes, Sequence[int]], float]
    gradient: Callable[[Changes, Sequence[int]], tuple[float, Changes]]
    rounded: Callable[[Changes], Changes]


@dataclass
class TuneState:
    """Where tuning is: all that the next step depends on. Tensors are changes, or of their shapes, by name.

    step: steps done. size: of steps, beside what was asked: halved whenever a state was worse than the start, which
    sent tuning back to the best one, after step `began`. late: the sum of late states, and how many.
    first, least: KL on held-out text of the start and of the best state. losses: KL on the text of each step.
    judged: by step, KL on held-out text. trouble: why it stopped early, empty where it did not.
    """

    changes: dict[str, torch.Tensor]
    adams: dict[str, Adam]
    best: dict[str, torch.Tensor]
    late: dict[str, torch.Tensor]
    late_count: int = 0
    step: int = 0
    size: float = 1.0
    began: int = 0
    first: float = math.inf
    least: float = math.inf
    losses: list[float] = field(default_factory=list)
    judged: dict[int, float] = field(default_factory=dict)
    trouble: str = ""

    @classmethod
    def of(cls, start: Changes) -> TuneState:
        """The start."""
        zeros = [{name: torch.zeros_like(each) for name, each in start.items()} for _ in range(3)]
        return cls(zeros[0], {name: Adam(each, FRESH) for name, each in start.items()}, zeros[1], zeros[2])

    @property
    def improved(self) -> bool:
        """Whether any state was better than the start."""
        return self.least < self.first

    def candidate(self) -> Changes:
        """What is judged now: the mean of late states where there are some, else the present one."""
        if not self.late_count:
            return self.changes
        return {name: total / self.late_count for name, total in self.late.items()}


def tune(
    model: Tunable,
    *,
    steps: int = 64,
    together: int = 2,
    step_size: float = 1e-3,
    seed: int = 0,
    state: TuneState | None = None,
    told: Callable[[TuneState], None] = lambda state: None,
) -> TuneState:
    """The state whose `best` changes diverge least from the original, on the batches that are held out of tuning.

    steps: each on `together` batches. step_size: the largest step, relative to what a number is. state: of an earlier
    call that was stopped, to go on from; the result is that of one call. told: is given the state after every step.
    """
    learning, held_out = split(model.batches)
    if state is None:
        state = TuneState.of(model.start)
        state.first = state.least = model.loss(state.best, held_out)
    for number, batches in enumerate(in_turn(learning, together, steps, seed)):
        if number < state.step:
            continue
        try:
            _step(model, state, batches, step_size * state.size * _size(number, steps))
        except NumbersError as error:
            state.trouble = error.what
            break
        if state.step > LATE * steps:
            _average(state)
        if state.step % max(FEW, steps // LOOKS) == 0 or state.step == steps:
            _look(model, state, held_out)
        told(state)
    return state


def _size(number: int, steps: int) -> float:
    """The size of step `number`, from 0, beside the largest."""
    warm = max(FEW, round(WARM_UP * steps))
    if number < warm:
        return (number + 1) / warm
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * (number - warm) / max(1, steps - warm))) / 2


def _step(model: Tunable, state: TuneState, batches: Sequence[int], size: float) -> None:
    """One step against the gradient. NumbersError, and nothing changed, when it is not finite."""
    loss, gradients = model.gradient(state.changes, batches)
    wrong = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    if wrong or not math.isfinite(loss):
        raise NumbersError(f"the gradient is not finite, first that of {wrong[0] if wrong else 'the loss'}")
    for name, gradient in gradients.items():
        state.changes[name] -= size * state.adams[name].direction(gradient, state.step - state.began + 1)
    state.losses.append(loss)
    state.step += 1


def _average(state: TuneState) -> None:
    """Add the present state to the sum of late ones."""
    state.late_count += 1
    for name, change in state.changes.items():
        state.late[name] += change


def _look(model: Tunable, state: TuneState, held_out: Sequence[int]) -> None:
    """Judge what there is on held-out text, and keep it where it is the best."""
    now = model.rounded(state.candidate())
    state.judged[state.step] = loss = model.loss(now, held_out)
    if loss < state.least:
        state.best, state.least = dict(now), loss
    if not loss <= state.first:
        _go_back(state)


def _go_back(state: TuneState) -> None:
    """To the best state, and on in half as large steps: what suits one model by its errors throws another one off."""
    fresh = TuneState.of(state.changes)
    state.changes = {name: change.clone() for name, change in state.best.items()}
    state.adams, state.late, state.late_count = fresh.adams, fresh.late, 0
    state.size, state.began = state.size / 2, state.step
