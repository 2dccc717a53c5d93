"""`outlierq report`: a finished run as its own record tells it, with what both models say where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outlierq.core.errors import ArgumentError, SourceError
from outlierq.core.report import REPORT_NAME, Report
from outlierq.load import open_checkpoint, result_in
from outlierq.load.record import report_beside
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring.samples import PROMPTS, Sample, make_samples


@dataclass(frozen=True)
class RunReport:
    """place: the folder or file that a run wrote. samples: what both models say, empty where nobody asked."""

    place: Path
    report: Report
    samples: tuple[Sample, ...] = ()


def run_report(place: Path, reference: Source | None, samples: int, resources: Resources = USUAL) -> RunReport:
    """What is known of a run. reference: the original, which says something to `samples` prompts beside the result.

    SourceError where no run has left its record; ArgumentError for more samples than there are prompts.
    """
    if not 0 <= samples <= len(PROMPTS):
        raise ArgumentError(f"{samples} samples: there are prompts for 0 to {len(PROMPTS)}", argument="samples")
    report = report_beside(place)
    if report is None:
        raise SourceError(
            f"{place} has no {REPORT_NAME}" if place.exists() else f"{place} does not exist",
            hint="give the folder or the GGUF file that `outlierq quantize` wrote",
        )
    if reference is None or not samples:
        return RunReport(place, report)
    written = open_checkpoint(str(result_in(place)), trust_remote_code=reference.trust_remote_code)
    return RunReport(place, report, make_samples(reference.open(), written, samples, resources))
