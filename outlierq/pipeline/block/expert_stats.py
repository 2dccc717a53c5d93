"""What pruning chooses by, made before the plan: a pass over the model that keeps two numbers for each expert."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from outlierq.calibrate.stored.stats_file import remove_statistics
from outlierq.core.model import Checkpoint
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.ledger.folder import refuse_existing
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.memory import check_together
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.planning.work import Work, work_of, work_of_calibration
from outlierq.pipeline.remodel.rewrite import original_of
from outlierq.recipe import Calibration, Recipe
from outlierq.registry import transform_method


def remove_expert_stats(out: Path) -> None:
    """The run for `out` is done: what was made here for it is not needed any more."""
    # The result is in place; a file that stays is no reason to call the run a failure.
    with suppress(OSError):
        remove_statistics(_folder(out))


def expert_stats(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    given: Path | None = None,
    restart: bool = False,
    resources: Resources = USUAL,
) -> Path | None:
    """The folder of the statistics that the recipe's pruning needs: those given, or else made here, beside `out`.

    None when the recipe prunes nothing, or names statistics itself. The text is that of the recipe's calibration; a
    stopped run continues. OutlierqError before any work when `resources.max_memory` is too little, for this or for the
    run that follows.
    """
    if not _fields(recipe):
        return None
    if given is not None:
        return given
    folder = _folder(out)
    if not folder.exists():
        # What stands in the way shows before the work, not after it.
        refuse_existing(out)
        plan = make_plan(checkpoint, recipe)
        if resources.max_memory is not None:
            check_together(works_of(plan, resources), resources.max_memory)
    if restart and resources.ranks.lead:
        remove_statistics(folder)
    calibrate(
        checkpoint,
        recipe.calibration or Calibration(),
        folder,
        only=_fields(recipe),
        resources=resources,
    )
    return folder


def works_of(plan: Plan, resources: Resources = USUAL) -> list[Work]:
    """What a run has to do: what the plan says, and before it the statistics that the pruning needs, if it does."""
    from outlierq.load import study

    works, fields = [work_of(plan, resources)], _fields(plan.recipe)
    if fields:
        before = study(original_of(plan.checkpoint))
        works.append(work_of_calibration(before, plan.recipe.calibration or Calibration(), fields, resources))
    return works


def _fields(recipe: Recipe) -> frozenset[str]:
    """The statistics that the recipe's pruning needs and does not name; empty when it prunes nothing."""
    steps = [step for step in recipe.pruning if not step.options.get("stats_folder")]
    return frozenset().union(*(transform_method(step.method).needs for step in steps))


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.experts")
