"""The best choice that a budget allows, with the exact size of the whole result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outlierq.core.errors import ArgumentError
from outlierq.ops.search.knapsack import Choice, knapsack, smallest, total
from outlierq.pipeline.fitting.goal import Budget
from outlierq.pipeline.fitting.layers import Layer, Storage
from outlierq.pipeline.fitting.losses import Predicted
from outlierq.pipeline.planning.plan import Plan

# Headers and configs name what was chosen, so their size depends on it, by some bytes a layer. Two or three rounds do.
ROUNDS = 8

Planner = Callable[[Sequence[Storage]], Plan]


@dataclass(frozen=True)
class Chosen:
    """How every layer is stored, what that is predicted to cost, and its plan."""

    storages: tuple[Storage, ...]
    loss: float
    plan: Plan


@dataclass(frozen=True)
class Options:
    """The choices of every layer as the knapsack sees them, in the same order."""

    storages: Sequence[Sequence[Storage]]
    units: Sequence[Sequence[Choice]]

    @classmethod
    def of(cls, layers: Sequence[Layer], losses: Predicted | None = None) -> Options:
        """losses: none, where sizes alone are asked of; a scheme without one is no choice."""
        known = [dict.fromkeys(layer.choices, 0.0) for layer in layers] if losses is None else losses
        pairs = list(zip(layers, known, strict=True))
        storages = [[storage for storage in layer.choices if storage in loss] for layer, loss in pairs]
        units = [
            [Choice(layer.choices[storage], loss[storage]) for storage in held]
            for (layer, loss), held in zip(pairs, storages, strict=True)
        ]
        return cls(storages, units)

    def stored(self, at: Sequence[int]) -> tuple[Storage, ...]:
        """How the layers are stored by a choice for each."""
        return tuple(storages[number] for storages, number in zip(self.storages, at, strict=True))


def check_budget(layers: Sequence[Layer], budget: Budget, planned: Planner) -> None:
    """ArgumentError when not even the smallest choice fits, or when all fits as it is: before anything is read."""
    options = Options.of(layers)
    least = budget.of(planned(options.stored(smallest(options.units))))
    if least > budget.limit:
        raise ArgumentError(
            f"{budget.shown(budget.limit)} are too few: {budget.words} takes {budget.shown(least)} at the least",
            argument=budget.argument,
        )
    most = budget.of(planned([None] * len(layers)))
    if most <= budget.limit:
        raise ArgumentError(
            f"{budget.shown(budget.limit)} are enough for the model as it is: {budget.words} takes "
            f"{budget.shown(most)} unquantized",
            argument=budget.argument,
        )


def choose(layers: Sequence[Layer], losses: Predicted, budget: Budget, planned: Planner) -> Chosen:
    """The choice with the least predicted loss whose plan keeps the budget."""
    options = Options.of(layers, losses)
    best = smallest(options.units)
    plan = planned(options.stored(best))
    capacity, too_many = _left(total(options.units, best).nbytes, plan, budget), None
    for _ in range(ROUNDS):
        found = knapsack(options.units, capacity)
        if found is None:
            break
        tried = planned(options.stored(found))
        left = _left(total(options.units, found).nbytes, tried, budget)
        if budget.of(tried) > budget.limit:
            too_many, capacity = capacity, min(capacity - 1, left)
            continue
        best, plan = found, tried
        if (left if too_many is None else min(left, too_many - 1)) <= capacity:
            break
        capacity = left if too_many is None else min(left, too_many - 1)
    return Chosen(options.stored(best), total(options.units, best).loss, plan)


def _left(nbytes: int, plan: Plan, budget: Budget) -> int:
    """Bytes of layers that the budget has room for. nbytes: of those in `plan`, whose other parts stay as large."""
    return nbytes + int((budget.limit - budget.of(plan)) / budget.per_byte)
