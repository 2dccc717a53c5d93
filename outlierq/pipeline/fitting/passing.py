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
from outlierq.ops.search.knapsack import EXACT, Units, frontier, knapsack, smallest, total
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
NO_KL = 1e-12  # nats: what is less is none


@dataclass(frozen=True)
class Tried:
    """A choice with the KL that was predicted, and its result with the one that was measured. at: by number."""

    fitted: Fitted
    folder: Path
    report: Report
    at: Sequence[int] = ()

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
    options = Options.of(space.layers, prediction.losses)
    return _fitted(space, options, least_bytes(options.units, max_kl * AIM), max_kl, prediction)


def pass_limit(space: Space, prediction: Prediction, max_kl: float, job: Job, told: Callable[[Fitted], Any]) -> Fitted:
    """Quantize and measure until the smallest passing choice stands; it is then at `out`.

    Where none passes, that is what came closest, and its evaluation says so. What was tried before is taken up again,
    and only blocks of which something changes are rounded anew.
    """
    options = Options.of(space.layers, prediction.losses)
    tried: list[Tried] = []
    for number in range(ROUNDS):
        at = _next(options.units, tried, max_kl)
        if at is None:
            break
        fitted = _fitted(space, options, at, max_kl, prediction)
        told(fitted)
        place = _place(job.out, number)
        job = replace(job, run=replace(job.run, alike=_alike(fitted.plan, tried)))
        tried.append(Tried(fitted, place, _measured(job, fitted.recipe, place), at))
        if CLOSE * max_kl <= tried[-1].kl <= max_kl:
            break
    best = _best(tried, max_kl)
    os.replace(best.folder, folder_of(job.out))
    for each in tried:
        if each is not best:
            shutil.rmtree(each.folder)
    return replace(best.fitted, report=best.report, remark=_remark(options.units, best, tried, max_kl))


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


def _next(units: Units, tried: Sequence[Tried], max_kl: float) -> list[int] | None:
    """The choice to try next: the smallest that is predicted to pass well, else any that is predicted to pass.

    None when every choice between what passed and what did not was tried.
    """
    for loss in (_aim(tried, max_kl), _most(tried, max_kl)):
        at = least_bytes(units, loss)
        if at not in [each.at for each in tried]:
            return at
    return None


def _most(tried: Sequence[Tried], max_kl: float) -> float:
    """The largest predicted KL that may pass, as the last result corrects the prediction; less than what did not."""
    if not tried:
        return max_kl
    failing = min((each.fitted.loss for each in tried if each.kl > max_kl), default=math.inf)
    return min(max_kl * tried[-1].fitted.loss / _measured_kl(tried[-1]), failing * (1 - EXACT))


def _aim(tried: Sequence[Tried], max_kl: float) -> float:
    """The predicted KL to look for: where the line through the two nearest results meets the limit, in logarithms.

    One result alone is a factor. Where that is not between what passed and what did not, it is their middle.
    """
    target = max_kl * AIM
    if not tried:
        return target
    near = sorted(tried, key=lambda each: abs(math.log(_measured_kl(each) / target)))[:2]
    aim = near[0].fitted.loss * math.pow(target / _measured_kl(near[0]), 1 / _slope(near))
    passing = max((each.fitted.loss for each in tried if each.kl <= max_kl), default=0.0)
    failing = min((each.fitted.loss for each in tried if each.kl > max_kl), default=math.inf)
    if 0 < passing < failing < math.inf and not passing < aim < failing:
        return math.sqrt(passing * failing)
    return aim


def _slope(near: Sequence[Tried]) -> float:
    """By what power of the predicted KL the measured one grows, as two results tell; 1 where there is but one.

    Where errors make experts change, it grows by the root rather.
    """
    if len(near) < 2 or not all(each.fitted.loss for each in near):
        return 1.0
    measured, predicted = (
        math.log(one / other) for one, other in (map(_measured_kl, near), (t.fitted.loss for t in near))
    )
    return min(max(measured / predicted, 0.5), 2.0) if predicted else 1.0


def _measured_kl(each: Tried) -> float:
    """Above zero, for logarithms."""
    return max(each.kl, NO_KL)


def _fitted(space: Space, options: Options, at: Sequence[int], max_kl: float, prediction: Prediction) -> Fitted:
    """The recipe of a choice. ArgumentError for the one that quantizes nothing."""
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


def _remark(units: Units, best: Tried, tried: Sequence[Tried], max_kl: float) -> str:
    """Why nothing is closer to the limit; empty for what is close, and for what does not pass."""
    if not best.kl < CLOSE * max_kl:
        return ""
    closest = f"the KL is {best.kl / max_kl:.0%} of the limit, and no choice lies closer below it: "
    smaller = knapsack(units, total(units, best.at).nbytes - 1)
    if smaller is None:
        return closest + "this is the smallest that can be stored"
    measured = next((each.kl for each in tried if each.at == smaller), None)
    if measured is not None:
        return f"{closest}the next smaller one has {measured:.4g} nats"
    kl = total(units, smaller).loss * best.kl / best.fitted.loss
    if kl <= max_kl:
        return f"the KL is {best.kl / max_kl:.0%} of the limit after {len(tried)} rounds; a smaller choice may pass"
    return f"{closest}the next smaller one is predicted to have {kl:.4g} nats, as the measured KL corrects it"
