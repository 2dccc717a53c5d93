"""Where a run's statistics come from: nowhere, a file, or the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from outlierq.core.errors import RecipeError
from outlierq.core.model import InputGroup
from outlierq.core.scheme import ActivationScheme
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.imatrix import StatsFromImatrix
from outlierq.pipeline.block.stats import NoStats, StatsFromFile, StatsSource
from outlierq.pipeline.block.stats_framed import StatsForFrame
from outlierq.pipeline.block.stats_run import Asked, StatsFromRun, in_shards, token_set
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings
from outlierq.pipeline.processes.ranks import Ranks
from outlierq.pipeline.processes.sharding import all_of_lead, dealt
from outlierq.pipeline.remodel.rewrite import changing_method, new_shifts, original_of
from outlierq.recipe import Calibration, Learn

MASKED = "the model sees later tokens: calibrated on text with a random share of each window behind its mask token"


def refuse_changed(plan: Plan, stats: Path) -> None:
    """RecipeError when the recipe makes another model of the source, so that statistics do not fit."""
    changing = changing_method(plan.checkpoint)
    if changing:
        raise RecipeError(
            f"{changing} rewrites the whole model; the statistics in {stats} are of another one",
            hint="leave --stats out: the run then calibrates the rewritten model itself. For several recipes on "
            "one rewritten model, write it first (no `quantize` section, export.format: dense) and calibrate that",
        )


def owners_for(plan: Plan) -> Callable[[Sequence[InputGroup], Ranks], dict[str, int]]:
    """How groups are dealt to ranks: by their cost, but to the lead alone where channels change their order.

    A permutation is tried on the model with the tensors that the one before it left.
    """
    return all_of_lead if plan.recipe.permutations else dealt


def rounded_inputs(plan: Plan) -> dict[str, ActivationScheme]:
    """How the client rounds the input of each linear, by module, where the recipe asks for statistics of that."""
    calibration = plan.recipe.calibration
    if calibration is None or calibration.inputs == "exact":
        return {}
    return {site.module: scheme.activations for site, scheme in plan.schemes.items() if scheme.activations is not None}


def stats_source(
    plan: Plan,
    work: Path,
    stats: Path | None = None,
    resources: Resources = USUAL,
    savings: Savings = NO_SAVINGS,
    former: int | None = None,
) -> StatsSource:
    """Where statistics come from: nowhere, a file, or the model itself. former: shards of the run that goes on."""
    needs, recipe, ranks = plan.recipe.needs, plan.recipe, resources.ranks
    if not needs:
        unused = f"{recipe.name} needs no statistics; those in {stats} were not used" if stats else ""
        return NoStats(plan.structure, remark=unused)
    calibration = recipe.calibration
    assert calibration is not None, "a recipe whose methods need statistics has a calibration section"
    if stats is not None:
        if calibration.mode == "sequential":
            raise RecipeError(
                f"calibration.mode is sequential, which runs the model; the statistics in {stats} are static",
                hint="leave --stats out, or --set calibration.mode=static",
            )
        if calibration.inputs == "rounded":
            raise RecipeError(
                f"calibration.inputs is rounded, which runs the model; the statistics in {stats} are of exact inputs",
                hint="leave --stats out, or --set calibration.inputs=exact --set calibration.mode=static "
                "--set quantize.method=gptq",
            )
        if recipe.permutations:
            raise RecipeError(
                f"{recipe.permutations[0].method} tries its permutations on the model, which --stats does not run",
                hint="leave --stats out",
            )
        refuse_changed(plan, stats)
        if stats.is_file():
            return StatsFromImatrix(stats, plan)
        if plan.checkpoint.studied() is not None:
            return StatsForFrame(stats, plan.checkpoint, plan.structure, needs)
        return StatsFromFile(
            stats, original_of(plan.checkpoint), plan.structure, needs, shifts=new_shifts(plan.checkpoint)
        )
    from outlierq.calibrate.collect import stored_fields

    tokens = ranks.first(lambda: token_set(plan.model, calibration, work, resources))
    settings, remark = in_shards(calibration, len(tokens.ids), ranks, former)
    if recipe.learn is not None:
        _check_learning(recipe.learn, settings, len(tokens.ids), ranks)
    folds = bool(recipe.group_transforms or recipe.permutations)
    learns = recipe.learn is not None
    asked = Asked(stored_fields(needs), folds, rounded_inputs(plan), learns, owners_for(plan))
    source = StatsFromRun(plan.model, tokens, settings, work, resources, savings, asked)
    said = (remark, MASKED if tokens.masked else "", str(tokens.unseen or ""))
    source.remark = "; ".join(filter(None, said))
    return source


def _check_learning(learn: Learn, settings: Calibration, windows: int, ranks: Ranks) -> None:
    """RecipeError where learning has too little text to hold some out, or would see a part of it only."""
    if ranks.size > 1:
        raise RecipeError(
            f"{learn.method} learns on all text in one process, and there are {ranks.size}",
            hint="run it in one process, or leave the `learn` section out",
        )
    if windows <= settings.batch_size:
        raise RecipeError(
            f"{learn.method} holds a batch of text out of learning, and {windows} windows are one batch",
            hint=f"set calibration.samples to {2 * settings.batch_size} or more, or calibration.batch_size to 1",
        )
