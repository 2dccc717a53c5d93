"""The multiple-choice knapsack: one choice for each unit, so that the sizes fit and the sum of the losses is least.

Sinha, Zoltners 1979, "The Multiple-Choice Knapsack Problem": the linear relaxation walks along the lower convex hulls
of the units, steepest step first. What it leaves is closed exactly, by the list of states (size, loss) that none beats
in both (Nemhauser, Ullmann 1969), less those that the relaxation shows to end above a solution that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# States that are kept after a unit. No model needed a hundredth of it; above, the result is no longer proved the best.
MOST_STATES = 1 << 18
EXACT = 1e-12  # relative to the loss: two solutions whose losses differ by less are the same


@dataclass(frozen=True)
class Choice:
    """What one way to store a unit costs. nbytes: of its tensors. loss: what it adds to the loss of the model."""

    nbytes: int
    loss: float


Units = Sequence[Sequence[Choice]]


@dataclass(frozen=True)
class Step:
    """From one choice of a unit to a larger one on its lower convex hull. gain: loss that a further byte saves."""

    unit: int
    choice: int
    nbytes: int
    loss: float

    @property
    def gain(self) -> float:
        """Loss saved per byte."""
        return -self.loss / self.nbytes


def smallest(units: Units) -> list[int]:
    """The smallest choice of every unit; of equally small ones that with the least loss."""
    return [min(range(len(unit)), key=lambda at: (unit[at].nbytes, unit[at].loss)) for unit in units]


def total(units: Units, chosen: Sequence[int]) -> Choice:
    """Bytes and loss of a choice for each unit."""
    parts = [unit[at] for unit, at in zip(units, chosen, strict=True)]
    return Choice(sum(part.nbytes for part in parts), sum(part.loss for part in parts))


def frontier(units: Units) -> list[Step]:
    """All steps from the smallest solution along the convex frontier, most loss saved per byte first."""
    steps = [step for number, unit in enumerate(units) for step in _steps(number, unit)]
    return sorted(steps, key=lambda step: (-step.gain, step.unit, step.nbytes))


def knapsack(units: Units, capacity: int) -> list[int] | None:
    """The choice for each unit with the least sum of losses among those of at most `capacity` bytes in all.

    None when not even the smallest choices fit. Of solutions with equal losses the smaller one is taken; the same
    input gives the same output.
    """
    base = smallest(units)
    left = capacity - total(units, base).nbytes
    if left < 0:
        return None
    known, price = _filled(units, base, left)
    return _closed(units, capacity, known, price)


def hull(unit: Sequence[Choice]) -> list[int]:
    """The corners of the lower convex hull of a unit's choices, from its smallest one to its least loss."""
    order = sorted(range(len(unit)), key=lambda at: (unit[at].nbytes, unit[at].loss, at))
    corners: list[int] = []
    for at in order:
        if corners and unit[at].loss >= unit[corners[-1]].loss:
            continue
        while len(corners) > 1 and _gain(unit, corners[-2], corners[-1]) <= _gain(unit, corners[-1], at):
            corners.pop()
        corners.append(at)
    return corners


def _steps(number: int, unit: Sequence[Choice]) -> list[Step]:
    """The steps along the hull of a unit."""
    pairs = pairwise(hull(unit))
    return [Step(number, b, unit[b].nbytes - unit[a].nbytes, unit[b].loss - unit[a].loss) for a, b in pairs]


def _gain(unit: Sequence[Choice], a: int, b: int) -> float:
    """Loss that a byte saves from choice a to the larger b."""
    return (unit[a].loss - unit[b].loss) / (unit[b].nbytes - unit[a].nbytes)


def _filled(units: Units, base: Sequence[int], left: int) -> tuple[list[int], float]:
    """A good solution, and the price of a byte: that of the first step that did not fit."""
    chosen, price = list(base), 0.0
    stopped: set[int] = set()
    for step in frontier(units):
        if step.unit in stopped:
            continue
        if step.nbytes > left:
            price = price or step.gain
            stopped.add(step.unit)  # its later steps start where this one ends
            continue
        chosen[step.unit] = step.choice
        left -= step.nbytes
    return chosen, price


def _closed(units: Units, capacity: int, known: list[int], price: float) -> list[int]:
    """The best solution of all. known: a solution that fits. price: of a byte, for the bound.

    A state that ends above the known solution even if all other units cost no more than their cheapest choice at this
    price, is dropped; that bound holds at any price.
    """
    best = total(units, known)
    margin = EXACT * max(abs(best.loss), 1e-30)
    cheapest = [min(choice.loss + price * choice.nbytes for choice in unit) for unit in units]
    least = [min(choice.nbytes for choice in unit) for unit in units]
    rest, room = sum(cheapest), capacity - sum(least)
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []  # by unit: the state before, and the choice, of every state
    for number, unit in enumerate(units):
        rest -= cheapest[number]
        room += least[number]
        grown = sizes[:, None] + np.array([choice.nbytes for choice in unit], np.int64)
        costs = losses[:, None] + np.array([choice.loss for choice in unit])
        bound = costs + price * grown + (rest - price * capacity)
        alive = np.flatnonzero((grown <= room) & (bound <= best.loss + margin))
        if not len(alive):
            return known  # only rounding can do that: the known solution is one of the states
        alive = alive[_undominated(grown.flat[alive], costs.flat[alive])]
        trail.append((alive // len(unit), alive % len(unit)))
        sizes, losses = grown.flat[alive], costs.flat[alive]
    return _traced(trail, int(np.lexsort((sizes, losses))[0]))


def _undominated(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Which states no other beats in size and loss, smallest first; at most `MOST_STATES`, evenly."""
    order = np.lexsort((losses, sizes))
    ordered = losses[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered)[:-1]])
    front = order[ordered < before]
    if len(front) > MOST_STATES:
        front = front[np.linspace(0, len(front) - 1, MOST_STATES).round().astype(np.int64)]
    return front


def _traced(trail: Sequence[tuple[np.ndarray, np.ndarray]], at: int) -> list[int]:
    """The choices that lead to state number `at` after the last unit."""
    chosen = []
    for before, choice in reversed(trail):
        chosen.append(int(choice[at]))
        at = int(before[at])
    return chosen[::-1]
