"""What pruning chooses by, made before the plan: a pass over the model that keeps two numbers for each expert."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from outlierq.calibrate.stored.stats_file import remove_statistics
from outlierq.core.model import Checkpoint
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.events import Listener, silent
from outlierq.pipeline.ledger.folder import refuse_existing
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.memory import check_together
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.planning.work import Work, work_of, work_of_calibration
from outlierq.pipeline.processes.ranks import ALONE, Ranks
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
    device: str = "cpu",
    restart: bool = False,
    trust_remote_code: bool = False,
    listen: Listener = silent,
    ranks: Ranks = ALONE,
    max_memory: int | None = None,
) -> Path | None:
    """The folder of the statistics that the recipe's pruning needs: those given, or else made here, beside `out`.

    None when the recipe prunes nothing, or names statistics itself. The text is that of the recipe's calibration; a
    stopped run continues. max_memory: bytes, here and in the run that follows; OutlierqError before any work when they
    are too few for either.
    """
    if not _fields(recipe):
        return None
    if given is not None:
        return given
    folder = _folder(out)
    if not folder.exists():
        # What stands in the way shows before the work, not after it.
        refuse_existing(out)
        plan = make_plan(checkpoint, recipe, trust_remote_code=trust_remote_code)
        if max_memory is not None:
            check_together(works_of(plan, device, ranks.size, trust_remote_code=trust_remote_code), max_memory)
    if restart and ranks.lead:
        remove_statistics(folder)
    calibrate(
        checkpoint,
        recipe.calibration or Calibration(),
        folder,
        device=device,
        trust_remote_code=trust_remote_code,
        only=_fields(recipe),
        listen=listen,
        ranks=ranks,
        max_memory=max_memory,
    )
    return folder


def works_of(plan: Plan, device: str = "cpu", ranks: int = 1, *, trust_remote_code: bool = False) -> list[Work]:
    """What a run has to do: what the plan says, and before it the statistics that the pruning needs, if it does."""
    from outlierq.load import build_skeleton, find_structure

    found, fields = [work_of(plan, device=device, ranks=ranks)], _fields(plan.recipe)
    if fields:
        before = original_of(plan.checkpoint)
        skeleton = build_skeleton(before, trust_remote_code=trust_remote_code)
        known = (before, skeleton, find_structure(before, skeleton), plan.recipe.calibration or Calibration(), fields)
        found.append(work_of_calibration(*known, device, ranks=ranks))
    return found


def _fields(recipe: Recipe) -> frozenset[str]:
    """The statistics that the recipe's pruning needs and does not name; empty when it prunes nothing."""
    steps = [step for step in recipe.pruning if not step.options.get("stats_folder")]
    return frozenset().union(*(transform_method(step.method).needs for step in steps))


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.experts")
