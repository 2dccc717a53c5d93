"""The multiple-choice knapsack: equal to trying everything, within its budget, monotone."""

from __future__ import annotations

import itertools
import random

import pytest

from outlierq.ops.search.knapsack import Choice, frontier, knapsack, smallest, total


def made(seed: int, units: int = 5, choices: int = 4) -> list[list[Choice]]:
    """Random units; some choices are worse than others in both ways, some are equal, as real ones are."""
    draw = random.Random(seed)
    step = draw.choice([1, 1, 64])

    def choice() -> Choice:
        size = draw.randint(1, 60) * step
        return Choice(size, draw.choice([draw.random(), draw.randint(0, 3), 100 / size]))

    return [[choice() for _ in range(draw.randint(1, choices))] for _ in range(units)]


def by_trying_everything(units: list[list[Choice]], capacity: int) -> float | None:
    """The least loss that fits, None when nothing does."""
    fitting = [
        loss for nbytes, loss in
        ((sum(c.nbytes for c in each), sum(c.loss for c in each)) for each in itertools.product(*units))
        if nbytes <= capacity
    ]  # fmt: skip
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_it_is_as_good_as_trying_everything_and_never_passes_the_budget(seed):
    units = made(seed)
    most = sum(max(choice.nbytes for choice in unit) for unit in units)
    least = total(units, smallest(units)).nbytes
    for capacity in (least - 1, least, (least + most) // 3, (least + most) // 2, most, most + 1):
        chosen, best = knapsack(units, capacity), by_trying_everything(units, capacity)
        if best is None:
            assert chosen is None
            continue
        assert chosen is not None
        reached = total(units, chosen)
        assert reached.nbytes <= capacity
        assert reached.loss == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_a_larger_budget_never_gives_a_larger_loss_and_the_same_input_the_same_answer():
    units = made(7, units=40, choices=8)
    least = total(units, smallest(units)).nbytes
    losses = []
    for capacity in range(least, least + 800, 13):
        chosen = knapsack(units, capacity)
        assert chosen is not None and chosen == knapsack(units, capacity)
        losses.append(total(units, chosen).loss)
    assert losses == sorted(losses, reverse=True)


def test_equal_units_of_many_sizes_end_in_a_moment():
    units = [
        [Choice(1000 * bits + 7 * number, 4.0**-bits * (1 + number / 50)) for bits in range(2, 9)]
        for number in range(150)
    ]
    chosen = knapsack(units, 600_003)
    assert chosen is not None and 595_000 < total(units, chosen).nbytes <= 600_003


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_convex_and_ends_at_the_least_loss(seed):
    units = made(seed, units=12)
    steps = frontier(units)
    gains = [step.gain for step in steps]
    assert gains and gains == sorted(gains, reverse=True) and min(gains) > 0
    chosen = smallest(units)
    for step in steps:
        chosen[step.unit] = step.choice
    assert total(units, chosen).loss == pytest.approx(sum(min(c.loss for c in unit) for unit in units))
