"""The smallest checkpoint whose measured KL keeps a limit: predicted, measured, the prediction corrected, and again."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlierq.core.errors import ArgumentError, StatsError
from outlierq.core.model import Block
from outlierq.core.report import REPORT_NAME, Report
from outlierq.core.scheme import QuantScheme
from outlierq.ops.search.knapsack import Units, frontier, knapsack, smallest, total
from outlierq.pipeline.asked.request import Source, folder_of
from outlierq.pipeline.asked.resources import Resources
from outlierq.pipeline.compress import Run, compress
from outlierq.pipeline.fitting.choosing import Chosen, Options
from outlierq.pipeline.fitting.losses import Prediction
from outlierq.pipeline.fitting.space import Fitted, Space, written
from outlierq.pipeline.measuring.measure import read_report
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Gate, Recipe

ROUNDS = 4
# Of the limit: what is aimed at, so that a miss by 2 % still passes; and what is close enough below it.
AIM, CLOSE = 0.975, 0.95


@dataclass(frozen=True)
class Tried:
    """A choice with the KL that was predicted, and its result with the one that was measured."""

    fitted: Fitted
    folder: Path
    report: Report

    @property
    def kl(self) -> float:
        """As measured."""
        kl = None if self.report.evaluation is None else self.report.evaluation.kl
        assert kl is not None, "a gate of KL was measured"
        return kl


def check_limit(prediction: Prediction, max_kl: float, stats: Path) -> None:
    """StatsError when nothing predicts a KL, ArgumentError when nothing has to be quantized less than it can be."""
    if not prediction.in_nats:
        raise StatsError(
            f"the statistics in {stats} hold no sensitivities, so no KL can be predicted",
            hint="run the same `outlierq calibrate` with --sensitivity, which adds them; or give a size or bits",
        )
    if max_kl <= 0:
        raise ArgumentError("a KL of 0 is that of the original alone", argument="max_kl")


def least_bytes(units: Units, loss: float) -> list[int]:
    """The smallest choice for each unit together whose sum of losses is at most `loss` (at least what can be)."""
    chosen = smallest(units)
    if total(units, chosen).loss <= loss:
        return chosen
    low = high = total(units, chosen).nbytes
    for step in frontier(units):
        chosen[step.unit] = step.choice
        if total(units, chosen).loss <= loss:
            break
    high = total(units, chosen).nbytes
    while high - low > 1:
        middle = (low + high) // 2
        found = knapsack(units, middle)
        if found is not None and total(units, found).loss <= loss:
            chosen = found
            high = min(middle, total(units, found).nbytes)
        else:
            low = middle
    return chosen


@dataclass(frozen=True)
class Job:
    """How a choice is carried out: on what, where to, and with what."""

    source: Source
    out: str | os.PathLike[str]
    run: Run
    resources: Resources


def smallest_of(space: Space, prediction: Prediction, max_kl: float) -> Fitted:
    """The smallest choice that is predicted to keep a limit, not measured."""
    return _fitted(space, Options.of(space.layers, prediction.losses), max_kl * AIM, max_kl, prediction)


def pass_limit(space: Space, prediction: Prediction, max_kl: float, job: Job, told: Callable[[Fitted], Any]) -> Fitted:
    """Quantize and measure until the smallest passing choice stands; it is then at `out`.

    Where none passes, that is what came closest, and its evaluation says so. What was tried before is taken up again,
    and only blocks of which something changes are rounded anew.
    """
    options = Options.of(space.layers, prediction.losses)
    tried: list[Tried] = []
    for number in range(ROUNDS):
        fitted = _fitted(space, options, _aim(tried, max_kl), max_kl, prediction)
        if fitted.recipe.fingerprint in [each.fitted.recipe.fingerprint for each in tried]:
            break
        told(fitted)
        place = _place(job.out, number)
        job = replace(job, run=replace(job.run, alike=_alike(fitted.plan, tried)))
        tried.append(Tried(fitted, place, _measured(job, fitted.recipe, place)))
        if CLOSE * max_kl <= tried[-1].kl <= max_kl:
            break
    best = _best(tried, max_kl)
    os.replace(best.folder, folder_of(job.out))
    for each in tried:
        if each is not best:
            shutil.rmtree(each.folder)
    return replace(best.fitted, report=best.report)


def _alike(plan: Plan, tried: Sequence[Tried]) -> dict[int, Path]:
    """For each block whose schemes were tried before the last result that has them.

    Statistics from a folder are those of the original model, so what becomes of a block does not depend on others;
    unless it learns, from what the blocks before it make of text.
    """
    if plan.recipe.learn is not None:
        return {}
    return {
        block.index: each.folder
        for block in plan.structure.blocks
        for each in tried
        if _schemes(plan, block) == _schemes(each.fitted.plan, block)
    }


def _schemes(plan: Plan, block: Block) -> dict[str, QuantScheme | None]:
    """How each linear of a block is stored, by name; None for 16 bits."""
    return {site.weight: plan.schemes.get(site) for site in block.sites}


def _aim(tried: Sequence[Tried], max_kl: float) -> float:
    """The predicted KL to look for: what the last result makes of the prediction, between what passed and what did not.

    Where it makes nothing of that, the middle of the two, in the logarithm.
    """
    if not tried:
        return max_kl * AIM
    aim = max_kl * AIM * tried[-1].fitted.loss / tried[-1].kl
    passing = max((each.fitted.loss for each in tried if each.kl <= max_kl), default=0.0)
    failing = min((each.fitted.loss for each in tried if each.kl > max_kl), default=math.inf)
    if passing < failing and not passing < aim < failing and passing > 0 and failing < math.inf:
        return math.sqrt(passing * failing)
    return aim


def _fitted(space: Space, options: Options, aim: float, max_kl: float, prediction: Prediction) -> Fitted:
    """The smallest choice that is predicted to lose no more than `aim`."""
    at = least_bytes(options.units, aim)
    if all(storage is None for storage in options.stored(at)):
        least = total(options.units, _all_but_one(options.units)).loss
        raise ArgumentError(
            f"a KL of {max_kl:g} nats leaves nothing to quantize; the least that a mixture costs is {least:.2g}",
            argument="max_kl",
        )
    chosen = Chosen(options.stored(at), total(options.units, at).loss, space.planned(options.stored(at)))
    base = space.base.model_copy(update={"gate": (space.base.gate or Gate()).model_copy(update={"max_kl": max_kl})})
    return written(replace(space, base=base), chosen, f"KL of at most {max_kl:g} nats", prediction)


def _all_but_one(units: Units) -> list[int]:
    """The last solution of the frontier that is smaller than the largest."""
    chosen = smallest(units)
    for step in frontier(units)[:-1]:
        chosen[step.unit] = step.choice
    return chosen


def _measured(job: Job, recipe: Recipe, place: Path) -> Report:
    """The report of a result, which is taken up when an earlier run has it already."""
    if (place / REPORT_NAME).is_file():
        report = read_report(place)
        if report.settings == recipe.model_dump(mode="json") and report.evaluation is not None:
            return report
    return compress(job.source, recipe, place, job.run, job.resources)


def _place(out: str | os.PathLike[str], number: int) -> Path:
    """Where a round is written, beside the result."""
    folder = folder_of(out)
    return folder.with_name(f"{folder.name}.round-{number + 1}")


def _best(tried: Sequence[Tried], max_kl: float) -> Tried:
    """The smallest that passes, else what came closest."""
    passing = [each for each in tried if each.kl <= max_kl]
    if passing:
        return min(passing, key=lambda each: each.report.output_bytes)
    return min(tried, key=lambda each: each.kl)
