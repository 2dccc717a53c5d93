"""`outlierq fit`: the best mixture of schemes within a budget, chosen from statistics, as an ordinary recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outlierq import __version__
from outlierq.core.errors import ArgumentError
from outlierq.core.model import Checkpoint
from outlierq.core.report import Report
from outlierq.load import check_recorded, reading_ahead
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.stats import StatsFromFile
from outlierq.pipeline.compress import Run, compress
from outlierq.pipeline.fitting.choosing import Chosen, check_budget, choose
from outlierq.pipeline.fitting.goal import Budget, bits_budget, card_budget, size_budget
from outlierq.pipeline.fitting.layers import Layer, Storage, layers_of
from outlierq.pipeline.fitting.losses import Prediction, predict
from outlierq.pipeline.fitting.storage import BESIDE, Client, asking, known_client, storages
from outlierq.pipeline.fitting.written import recipe_text, recipe_with
from outlierq.pipeline.measuring.cache import keep, key_of, recall
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Recipe

# A scheme that every format holds: which linears there are to choose for does not depend on it.
ANY = replace(BESIDE, group_size=32)


@dataclass(frozen=True)
class Goal:
    """What the result shall be: exactly one of size, bits and card, for a client.

    context: tokens of the cache that the card holds, too. numbers: to choose from; all that the client loads, if empty.
    """

    size: str | None = None
    bits: float | None = None
    card: str | None = None
    context: int | None = None
    client: str = "transformers"
    numbers: Sequence[str] = ()

    def check(self) -> None:
        """ArgumentError when there is no goal, or several that contradict."""
        given = [name for name in ("size", "bits", "card") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(f'--{name}' for name in given)} are several goals" if given else "there is no goal"
            raise ArgumentError(f"{said}; give one of --size, --bits and --card with --context", argument="size")
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
        return card_budget(self.card, self.context, plan.checkpoint.config)


@dataclass(frozen=True)
class Fitted:
    """A recipe that keeps a goal. text: of the recipe. loss: predicted, in nats where `in_nats` says so.

    report: of the run that carried it out, None where there was none.
    """

    recipe: Recipe
    text: str
    plan: Plan
    loss: float
    in_nats: bool
    report: Report | None = None


@dataclass(frozen=True)
class Space:
    """What there is to choose from: the layers of a model, and the recipe with which they are quantized."""

    checkpoint: Checkpoint
    base: Recipe
    plan: Plan
    client: Client
    layers: Sequence[Layer]

    def planned(self, storages: Sequence[Storage]) -> Plan:
        """The plan of a choice for every layer; one that keeps all has sizes only."""
        if all(storage is None for storage in storages):
            return _kept(self.plan)
        return make_plan(self.checkpoint, recipe_with(self.base, self.layers, storages))


def space_of(checkpoint: Checkpoint, recipe: Recipe, client: str, numbers: Sequence[str] = ()) -> Space:
    """The choices that a client leaves. ArgumentError or RecipeError when there are none."""
    known = known_client(client)
    if recipe.quantize is None:
        raise ArgumentError(f"{recipe.name} quantizes nothing", argument="recipe")
    base = recipe.model_copy(update={"export": recipe.export.model_copy(update={"format": known.format})})
    schemes = storages(base, known, checkpoint.dtype, numbers)
    plan = replace(make_plan(checkpoint, asking(base, ANY)), recipe=base)
    layers = layers_of(plan, known, schemes)
    if not layers:
        raise ArgumentError(f"no linear of this model can be stored for {known.word}", argument="client")
    return Space(checkpoint, base, plan, known, layers)


def _kept(plan: Plan) -> Plan:
    """The plan with every linear in blocks as it is in the source."""
    from outlierq.pipeline.planning.decide import assembled

    sites = tuple(replace(each, scheme=None) if each.site.block is not None else each for each in plan.sites)
    return assembled(plan.model, sites, plan.recipe, plan.caches, plan.together)


def fitted(space: Space, goal: Goal, stats: Path, resources: Resources = USUAL) -> Fitted:
    """The recipe with the least predicted loss that keeps the goal."""
    budget = goal.budget(space.plan, space.layers)
    check_budget(space.layers, budget, space.planned)
    prediction = predicted(space, stats, resources)
    chosen = choose(space.layers, prediction.losses, budget, space.planned)
    return _written(space, chosen, budget, prediction)


def predicted(space: Space, stats: Path, resources: Resources = USUAL) -> Prediction:
    """What every layer costs in every scheme, from the statistics in a folder; kept by content for the next time."""
    plan = space.plan
    if plan.recipe.rewrites:
        raise ArgumentError(f"{plan.recipe.name} rewrites the model, and statistics are not of it", argument="recipe")
    source = StatsFromFile(stats, plan.checkpoint, plan.structure, plan.recipe.needs | {"hessian"})
    key = key_of(
        {
            "question": "losses",
            "statistics": source.reader.digest,
            "recipe": plan.recipe.fingerprint,
            "layers": [[layer.name, *map(str, layer.choices)] for layer in space.layers],
            "versions": [__version__, version("torch")],
            "device": resources.device,
        }
    )
    known = recall(key)
    if known is not None:
        return Prediction.from_dict(known, space.layers)
    made = predict(plan, source, space.layers, source.reader.sensitivity(), listen=resources.listen)
    keep(key, made.to_dict())
    return made


def _written(space: Space, chosen: Chosen, budget: Budget, prediction: Prediction) -> Fitted:
    """The recipe of a choice."""
    held = budget.shown(budget.of(chosen.plan))
    loss = f"KL {chosen.loss:.4f} nats" if prediction.in_nats else f"loss {chosen.loss:.4g} (no unit)"
    description = f"fitted for {space.client.word}: {held} of {budget.shown(budget.limit)}, predicted {loss}"
    text = recipe_text(space.base, space.layers, chosen.storages, description)
    recipe = recipe_with(space.base, space.layers, chosen.storages, description)
    return Fitted(recipe, text, chosen.plan, chosen.loss, prediction.in_nats)


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
        space = space_of(checkpoint, recipe, goal.client, goal.numbers)
    found = fitted(space, goal, run.stats, resources)
    told(found)
    return found if out is None else replace(found, report=compress(source, found.recipe, out, run, resources))
