"""What pruning chooses by, made before the plan: a pass over the model that keeps two numbers for each expert."""

from __future__ import annotations

import shutil
from pathlib import Path

from outlierq.core.model import Checkpoint
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.events import Listener, silent
from outlierq.pipeline.journal import refuse_existing
from outlierq.pipeline.plan import make_plan
from outlierq.pipeline.ranks import ALONE, Ranks
from outlierq.recipe import Calibration, Recipe
from outlierq.registry import transform_method


def remove_expert_stats(out: Path) -> None:
    """The run for `out` is done: what was made here for it is not needed any more."""
    shutil.rmtree(_folder(out), ignore_errors=True)


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
) -> Path | None:
    """The folder of the statistics that the recipe's pruning needs: those given, or else made here, beside `out`.

    None when the recipe prunes nothing, or names statistics itself. The text is that of the recipe's calibration; a
    stopped run continues.
    """
    steps = [step for step in recipe.pruning if not step.options.get("stats_folder")]
    if not steps:
        return None
    if given is not None:
        return given
    folder = _folder(out)
    if not folder.exists():
        # What stands in the way shows before the work, not after it.
        refuse_existing(out)
        make_plan(checkpoint, recipe, trust_remote_code=trust_remote_code)
    if restart and ranks.lead:
        shutil.rmtree(folder, ignore_errors=True)
    calibrate(
        checkpoint,
        recipe.calibration or Calibration(),
        folder,
        device=device,
        trust_remote_code=trust_remote_code,
        only=frozenset().union(*(transform_method(step.method).needs for step in steps)),
        listen=listen,
        ranks=ranks,
    )
    return folder


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.experts")
