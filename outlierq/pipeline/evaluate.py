"""`outlierq eval`: measure a checkpoint, beside its original when there is one, and hold it against limits."""

from __future__ import annotations

from dataclasses import dataclass

from outlierq.core.errors import ArgumentError
from outlierq.core.limits import Limits
from outlierq.core.model import Checkpoint
from outlierq.core.report import Evaluation
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring.measure import (
    LLAMA_CPP,
    Measurement,
    judge,
    measure,
    read_report,
    record,
    with_command,
)
from outlierq.pipeline.planning.memory import check_evaluation

NO_LIMITS = Limits()


@dataclass(frozen=True)
class Keeping:
    """Where a result may come from, and what becomes of it.

    cached: what was measured before is taken again. record: put the result into the checkpoint's report, too.
    command: how to repeat it, a part of the result.
    """

    cached: bool = True
    record: bool = False
    command: str | None = None


USUAL_KEEPING = Keeping()


def evaluate(
    source: Source,
    reference: Source | None,
    measurement: Measurement,
    limits: Limits = NO_LIMITS,
    *,
    keeping: Keeping = USUAL_KEEPING,
    resources: Resources = USUAL,
) -> Evaluation:
    """Measure, and judge; a limit that was passed is in the result, and is no error."""
    if limits.needs_reference and reference is None:
        raise ArgumentError("quality gates compare with an original; give --reference", argument="reference")
    if measurement.backend == LLAMA_CPP:
        return _by_llama_cpp(source, reference, measurement, limits, keeping, resources)
    checkpoint, original = source.open(), None if reference is None else reference.open()
    if resources.max_memory is not None:
        _check_memory([each for each in (checkpoint, original) if each], measurement, resources.max_memory)
    if keeping.record:
        read_report(checkpoint.path)  # before hours of work, not after
    evaluation = judge(measure(checkpoint, original, measurement, cached=keeping.cached, resources=resources), limits)
    evaluation = with_command(evaluation, keeping.command)
    if keeping.record:
        record(checkpoint.path, evaluation=evaluation)
    return evaluation


def _by_llama_cpp(
    source: Source,
    reference: Source | None,
    measurement: Measurement,
    limits: Limits,
    keeping: Keeping,
    resources: Resources,
) -> Evaluation:
    """The same of a GGUF file as llama.cpp computes it."""
    from outlierq.pipeline.measuring.llama_cpp import file_of, measure_with_llama_cpp

    if keeping.record:
        read_report(file_of(source).parent)
    measured = judge(measure_with_llama_cpp(source, reference, measurement, resources), limits)
    evaluation = with_command(measured, keeping.command)
    if keeping.record:
        record(file_of(source).parent, evaluation=evaluation)
    return evaluation


def _check_memory(checkpoints: list[Checkpoint], measurement: Measurement, most: int) -> None:
    """Refuse before work what would need more than `most` bytes."""
    from outlierq.load import build_skeleton

    if measurement.tasks:
        raise ArgumentError("what tasks need is not known beforehand; leave --tasks out", argument="max_memory")
    check_evaluation([build_skeleton(each) for each in checkpoints], measurement.dtype, measurement.window_length, most)
