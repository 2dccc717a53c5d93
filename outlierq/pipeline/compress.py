"""`outlierq quantize`: the main job in its order, from a recipe to a checkpoint that is verified and measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outlierq.core.errors import ArgumentError
from outlierq.core.model import Checkpoint
from outlierq.core.report import Report
from outlierq.load import check_recorded, open_checkpoint, reading_ahead, result_in
from outlierq.pipeline.asked.request import FormatAlone, Request, Source, folder_of, format_of
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.expert_stats import expert_stats, remove_expert_stats
from outlierq.pipeline.convert import convert, make_conversion
from outlierq.pipeline.fitting.sensitive import remove_sensitive_stats, with_sensitive_kept
from outlierq.pipeline.ledger.single import file_of, folder_for, put_in_place
from outlierq.pipeline.measuring.measure import (
    Measurement,
    check_measurement,
    judge,
    measure,
    record,
    unmeasured,
    with_command,
)
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.estimate import estimate
from outlierq.pipeline.planning.memory import check_evaluation
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.processes.ranks import refuse_several
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.turning.made import remove_turns, turns_for
from outlierq.recipe import Gate, Recipe


@dataclass(frozen=True)
class Run:
    """How a run goes, beside what the recipe says; nothing of this changes what is written.

    stats: a folder of `outlierq calibrate` to use instead of running the model. data_dir: the data of the gate's tasks.
    restart: throw away an unfinished run in the same place. planned: is told of the plan before the work, with what it
    will cost; what it raises stops the run. command: how to repeat it, recorded with what was measured.
    alike: earlier results that have some blocks as they become here, by their index.
    """

    stats: Path | None = None
    data_dir: Path | None = None
    restart: bool = False
    planned: Callable[[Plan], Any] | None = None
    command: str | None = None
    alike: Mapping[int, Path] = field(default_factory=dict)


def compress(
    source: Source,
    request: Request,
    out: str | os.PathLike[str],
    run: Run = Run(),  # frozen
    resources: Resources = USUAL,
) -> Report:
    """Compress a checkpoint as asked and put the result at `out`, verified, and measured when there is a gate.

    An interrupted run continues, also one whose gate was not measured yet. A limit that was passed is in the report
    (`report.evaluation.passed`), and is no error. Several processes share the work; what the lead measured is not in
    the report of the others.
    """
    file = file_of(folder_of(out), format_of(request))
    if file is not None:
        report = _into_folder(source.in_its_frame(request, run.stats), request, folder_for(file), run, resources)
        return put_in_place(folder_for(file), file, report) if resources.ranks.lead else report
    return _into_folder(source.in_its_frame(request, run.stats), request, folder_of(out), run, resources)


def _into_folder(source: Source, request: Request, out: Path, run: Run, resources: Resources) -> Report:
    """The same, into a folder."""
    with source.opened_for(folder_of(out), restart=run.restart) as checkpoint:
        if isinstance(request, FormatAlone):
            if request.converts(checkpoint):
                return _converted(checkpoint, request.format, folder_of(out), run, resources)
            request = request.recipe
        report = _compressed(checkpoint, request, out, run, resources)
        if resources.ranks.lead:
            remove_expert_stats(folder_of(out))
            remove_sensitive_stats(folder_of(out))
            remove_turns(folder_of(out))
            checkpoint.drop_shards()
        return report


def _compressed(
    checkpoint: Checkpoint, recipe: Recipe, out: str | os.PathLike[str], run: Run, resources: Resources
) -> Report:
    """Plan, quantize, and hold the result against the gate."""
    folder, gate, ranks = folder_of(out), recipe.gate, resources.ranks
    ranks.first(lambda: check_recorded(checkpoint))
    measurement = None if gate is None else Measurement.of_gate(gate, data_dir=run.data_dir)
    if measurement is not None:
        ranks.first(lambda: check_measurement(checkpoint, measurement))
    experts = expert_stats(checkpoint, recipe, folder, given=run.stats, restart=run.restart, resources=resources)
    recipe, decided = with_sensitive_kept(
        checkpoint, recipe, folder, given=run.stats, restart=run.restart, resources=resources
    )
    turns = turns_for(checkpoint, recipe, folder, given=run.stats, restart=run.restart, resources=resources)
    with reading_ahead(checkpoint):  # a plan needs seconds of imports, and no weights
        made = make_plan(checkpoint, recipe, expert_stats=experts, turns=turns)
        plan = replace(made, decided=decided, alike=run.alike)
    if gate is not None and resources.max_memory is not None:
        check_evaluation([plan.model.skeleton] * 2, gate.dtype, gate.window_length, resources.max_memory)
    if run.planned is not None:
        run.planned(replace(plan, expected=estimate(plan, stats=run.stats is not None, device=resources.device)))
    report = None
    if gate is not None and not run.restart:  # a run that was stopped while its gate was measured goes on there
        report = ranks.first(lambda: unmeasured(folder, plan))
    report = report or quantize(
        plan,
        folder,
        stats=None if experts else run.stats,  # of the whole model, which is not the one that is quantized
        restart=run.restart,
        resources=resources,
    )
    if gate is None or measurement is None or not ranks.lead:
        return report
    return _measured(checkpoint, gate, measurement, out, run, resources)


def _measured(
    checkpoint: Checkpoint,
    gate: Gate,
    measurement: Measurement,
    out: str | os.PathLike[str],
    run: Run,
    resources: Resources,
) -> Report:
    """Measure the result beside its source, judge it, and put both into its report."""
    written = open_checkpoint(os.fspath(result_in(folder_of(out))), trust_remote_code=checkpoint.trust_remote_code)
    results = judge(measure(written, checkpoint, measurement, resources=resources), gate.limits)
    return record(folder_of(out), evaluation=with_command(results, run.command))


def _converted(checkpoint: Checkpoint, format: str, out: Path, run: Run, resources: Resources) -> Report:
    """Write the codes and scales of a compressed checkpoint in another format."""
    refuse_several("converting without loss")
    if resources.max_memory is not None:
        raise ArgumentError("a conversion has no ceiling", argument="max_memory")
    plan = make_conversion(checkpoint, format, listen=resources.listen)
    if run.planned is not None:
        run.planned(plan)
    report = convert(plan, out, restart=run.restart, listen=resources.listen)
    checkpoint.drop_shards()
    return report
