"""What there is to choose from for a model and a client, what each choice costs, and a choice as a recipe."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from outlierq import __version__
from outlierq.calibrate.stored.stats_file import FINISHED, StatsReader
from outlierq.core.errors import ArgumentError, RecipeError
from outlierq.core.model import Checkpoint
from outlierq.core.report import Report
from outlierq.core.scheme import QuantScheme
from outlierq.export import format_type
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.stats import StatsFromFile
from outlierq.pipeline.fitting.choosing import Chosen
from outlierq.pipeline.fitting.layers import Layer, Storage, layers_of
from outlierq.pipeline.fitting.losses import Prediction, predict
from outlierq.pipeline.fitting.storage import BESIDE, Client, asking, known_client, storages
from outlierq.pipeline.fitting.tables import opened, tables_of
from outlierq.pipeline.fitting.written import recipe_text, recipe_with
from outlierq.pipeline.measuring.cache import keep, key_of, recall
from outlierq.pipeline.planning.decide import assembled, make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Recipe

# A scheme that every format holds: which linears there are to choose for does not depend on it.
ANY = replace(BESIDE, group_size=32)


@dataclass(frozen=True)
class Fitted:
    """A recipe that keeps a goal. text: of the recipe. loss: predicted, in nats where `in_nats` says so.

    report: of the run that carried it out, None where there was none. remark: why nothing is closer to a limit.
    """

    recipe: Recipe
    text: str
    plan: Plan
    loss: float
    in_nats: bool
    report: Report | None = None
    remark: str = ""


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
            return _kept(self.plan, self.layers)
        return make_plan(self.checkpoint, recipe_with(self.base, self.layers, storages))


def space_of(
    checkpoint: Checkpoint, recipe: Recipe, client: str, numbers: Sequence[str] = (), stats: Path | None = None
) -> Space:
    """The choices that a client leaves. ArgumentError or RecipeError when there are none.

    stats: whose sensitivities tell of the table of embeddings and the output head; without them both stay as they are.
    """
    known = known_client(client)
    if recipe.quantize is None:
        raise ArgumentError(f"{recipe.name} quantizes nothing", argument="recipe")
    given = recipe.model_copy(update={"export": recipe.export.model_copy(update={"format": known.format})})
    schemes = storages(given, known, checkpoint.dtype, numbers)
    space = _space_of(checkpoint, given, known, schemes, _modules_of(stats))
    if space.plan.structure.towers:  # which an ignored head protects, too
        space = _space_of(checkpoint, given, known, schemes, ())
    if not space.layers:
        raise ArgumentError(f"no linear of this model can be stored for {known.word}", argument="client")
    return space


def _space_of(
    checkpoint: Checkpoint, given: Recipe, client: Client, schemes: Sequence[QuantScheme], tables: Collection[str]
) -> Space:
    """The same with the tables among these modules."""
    base = opened(given, holds_types=format_type(client.format).holds_types, tables=tables)
    plan = replace(make_plan(checkpoint, asking(base, ANY)), recipe=base)
    return Space(checkpoint, base, plan, client, layers_of(plan, client, schemes, tables_of(plan, given, tables)))


def _modules_of(stats: Path | None) -> Collection[str]:
    """Whose sensitivity statistics hold; whoever reads more of those that are not there says so."""
    known = None if stats is None or not (stats / FINISHED).is_file() else StatsReader(stats).sensitivity()
    return () if known is None else known.linears.keys()


def _kept(plan: Plan, layers: Sequence[Layer]) -> Plan:
    """The plan with every linear in blocks, and the tables that there are to choose for, as in the source."""
    tables = {layer.sites[0] for layer in layers if layer.is_table}
    is_kept = (each.site.block is not None or each.site in tables for each in plan.sites)
    sites = tuple(replace(p, scheme=None) if kept else p for p, kept in zip(plan.sites, is_kept, strict=True))
    return assembled(plan.model, sites, plan.recipe, plan.caches, plan.together)


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


def written(space: Space, chosen: Chosen, held: str, prediction: Prediction) -> Fitted:
    """The recipe of a choice. held: what it keeps, in words. RecipeError when the client does not load it."""
    check_loads(space.client, chosen.plan.clients)
    loss = f"KL {chosen.loss:.4f} nats" if prediction.in_nats else f"loss {chosen.loss:.4g} (no unit)"
    description = f"fitted for {space.client.word}: {held}, predicted {loss}"
    text = recipe_text(space.base, space.layers, chosen.storages, description)
    recipe = recipe_with(space.base, space.layers, chosen.storages, description)
    return Fitted(recipe, text, chosen.plan, chosen.loss, prediction.in_nats)


def check_loads(client: Client, lines: Sequence[str]) -> None:
    """RecipeError when every version of a client is said, by a plan's lines, not to load it, or to read it wrongly."""
    said = [line for line in lines if line.startswith(client.word)]
    if said and all("does not load" in line or " wrongly" in line for line in said):
        raise RecipeError(said[-1], hint="choose among other numbers by --numbers, or take another --client")
