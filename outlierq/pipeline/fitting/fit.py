"""`outlierq fit`: the best mixture of schemes within a budget, chosen from statistics, as an ordinary recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlierq.core.errors import ArgumentError
from outlierq.load import check_recorded, reading_ahead
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.compress import Run, compress
from outlierq.pipeline.fitting.choosing import check_budget, choose
from outlierq.pipeline.fitting.goal import CACHE_BYTES, Budget, bits_budget, card_budget, size_budget
from outlierq.pipeline.fitting.layers import Layer
from outlierq.pipeline.fitting.passing import Job, check_limit, pass_limit, smallest_of
from outlierq.pipeline.fitting.space import Fitted, Space, predicted, space_of, written
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Recipe


@dataclass(frozen=True)
class Goal:
    """What the result shall be: exactly one of size, bits, card and max_kl, for a client.

    context: tokens of the cache that the card holds, too. numbers: to choose from; all that the client loads, if empty.
    """

    size: str | None = None
    bits: float | None = None
    card: str | None = None
    context: int | None = None
    max_kl: float | None = None
    client: str = "transformers"
    numbers: Sequence[str] = ()

    def check(self) -> None:
        """ArgumentError when there is no goal, or several that contradict."""
        names = {"size": "--size", "bits": "--bits", "card": "--card", "max_kl": "--max-kl"}
        given = [option for name, option in names.items() if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are several goals" if given else "there is no goal"
            raise ArgumentError(
                f"{said}; give one of --size, --bits, --max-kl, or --card with --context", argument="size"
            )
        if (self.card is None) != (self.context is None):
            missing, there = ("context", "card") if self.context is None else ("card", "context")
            raise ArgumentError(f"--{there} needs --{missing}: a card holds weights and a cache", argument=missing)

    def budget(self, plan: Plan, layers: Sequence[Layer]) -> Budget:
        """The goal as a limit on what a plan takes."""
        if self.size is not None:
            return size_budget(self.size)
        if self.bits is not None:
            return bits_budget(self.bits, layers)
        assert self.card is not None and self.context is not None, "`check` was not asked"
        cache_bytes = CACHE_BYTES if plan.recipe.kv_cache is None else plan.recipe.kv_cache.scheme.bits // 8
        return card_budget(self.card, self.context, plan, cache_bytes=cache_bytes)


def fitted(space: Space, goal: Goal, stats: Path, resources: Resources = USUAL) -> Fitted:
    """The recipe with the least predicted loss that keeps the goal."""
    budget = goal.budget(space.plan, space.layers)
    check_budget(space.layers, budget, space.planned)
    prediction = predicted(space, stats, resources)
    chosen = choose(space.layers, prediction.losses, budget, space.planned)
    held = f"{budget.shown(budget.of(chosen.plan))} of {budget.shown(budget.limit)}"
    return written(space, chosen, held, prediction)


def fit(
    source: Source,
    recipe: Recipe,
    goal: Goal,
    run: Run,
    out: str | os.PathLike[str] | None = None,
    *,
    told: Callable[[Fitted], Any] = lambda fitted: None,
    resources: Resources = USUAL,
) -> Fitted:
    """Choose how every layer of a model is stored, so that the goal is kept with the least predicted loss.

    run: how the recipe that was found is carried out, where there is an `out`; it names the statistics to choose by.
    told: is given the recipe before that. OutlierqError, before statistics are read, when headers show that no choice
    can keep the goal, or that the client holds none of its numbers.
    """
    goal.check()
    if run.stats is None:
        raise ArgumentError("there are no statistics to choose by; `outlierq calibrate` writes them", argument="stats")
    checkpoint = source.open()
    check_recorded(checkpoint)
    with reading_ahead(checkpoint):
        space = space_of(checkpoint, recipe, goal.client, goal.numbers, run.stats)
    if goal.max_kl is not None:
        prediction = predicted(space, run.stats, resources)
        check_limit(prediction, goal.max_kl, run.stats)
        if out is None:
            return _told(smallest_of(space, prediction, goal.max_kl), told)
        return pass_limit(space, prediction, goal.max_kl, Job(source, out, run, resources), told)
    found = _told(fitted(space, goal, run.stats, resources), told)
    return found if out is None else replace(found, report=compress(source, found.recipe, out, run, resources))


def _told(found: Fitted, told: Callable[[Fitted], Any]) -> Fitted:
    """What was found, once it was told of."""
    told(found)
    return found
