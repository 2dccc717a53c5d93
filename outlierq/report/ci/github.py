"""What a job of GitHub shows: a summary in Markdown on its page, and failures as annotations.

The job says where: GITHUB_STEP_SUMMARY is a file that is added to, and with GITHUB_ACTIONS lines such as
`::error title=...::text` on stderr become annotations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.machine.printable import printable
from outlierq.report.markdown import inline
from outlierq.report.terminal import human_bytes, human_seconds

if TYPE_CHECKING:
    from outlierq.core.limits import GateRow
    from outlierq.core.report import Evaluation, Report

SUMMARY, JOB = "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"


def add_summary(text: str) -> None:
    """Add a part to the page of the job, where there is one. OSError when it cannot be written."""
    path = os.environ.get(SUMMARY)
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def annotation(text: str, title: str = "outlierq") -> str | None:
    """The line that makes an error an annotation of the job; None outside of one."""
    if os.environ.get(JOB) != "true":
        return None
    return f"::error title={_escaped(title, ':,')}::{_escaped(text)}"


def of_run(report: Report) -> str:
    """A run: what went in and came out, what it cost, and the gate where there was one."""
    rows = [
        ("size", human_bytes(report.source_bytes), f"{human_bytes(report.output_bytes)} ({report.size_ratio:.2f} ×)"),
        ("bits per weight", f"{report.source_bits_per_weight:.2f}", f"{report.bits_per_weight:.2f}"),
        *(_figures(report.evaluation) if report.evaluation else []),
        ("time", "", human_seconds(report.total_seconds)),
    ]
    parts = [f"### {inline(report.model)} by {inline(report.recipe)}", _table(("", "before", "after"), rows)]
    return "\n\n".join([*parts, *(_gate(report.evaluation) if report.evaluation else [])]) + "\n"


def of_evaluation(evaluation: Evaluation) -> str:
    """A measurement, and the limits that it was held against."""
    table = _table(("", "before", "after"), _figures(evaluation))
    return "\n\n".join([f"### {inline(evaluation['model'])}", table, *_gate(evaluation)]) + "\n"


def _figures(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """What was measured, as far as it was."""
    before = evaluation.reference_perplexity
    rows = [("perplexity", "" if before is None else f"{before:.3f}", f"{evaluation.perplexity:.3f}")]
    if evaluation.kl is not None and evaluation.top1 is not None:
        rows += [("KL divergence per token", "", f"{evaluation.kl:.4g} nats")]
        rows += [("top-1 agreement", "", f"{evaluation.top1:.2%}")]
    return rows


def _gate(evaluation: Evaluation) -> list[str]:
    """The limits as a table, where there were any."""
    rows: Sequence[GateRow] = evaluation.gate_rows
    if not rows:
        return []
    failed = sum(not row.passed for row in rows)
    verdict = f"**{failed} of {len(rows)} limits failed.**" if failed else "Every limit was kept."
    cells = [
        ("✅" if row.passed else "❌", inline(row.name), f"{row.value:.5g}", f"{row.relation} {row.limit:.5g}")
        for row in rows
    ]
    return [verdict, _table(("", "limit on", "measured", "limit"), cells)]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str, more: str = "") -> str:
    """The text as GitHub's commands want it: nothing in it ends the line or begins a property."""
    lines = "\n".join(printable(line, lines=False) for line in text.splitlines())
    return "".join(f"%{ord(letter):02X}" if letter in f"%\r\n{more}" else letter for letter in lines)
