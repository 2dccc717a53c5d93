"""What `outlierq study` measured, as terminal tables and as a page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from outlierq.pipeline.studying.caches import CacheStudy
    from outlierq.pipeline.studying.methods import MethodRow, MethodStudy
    from outlierq.pipeline.studying.texts import CalibrationStudy

HEADINGS = ("method", "bits", "output error", "KL", "perplexity", "of gptq's KL", "CPU s", "loads in")


def methods(study: MethodStudy) -> RenderableType:
    """One row for each method, and what all of them share."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if 0 < number < len(HEADINGS) - 1 else "left")
    for row in study.rows:
        table.add_row(row.name, *_figures(row), row.note or row.loads_in)
    return Group(table, Text(_shared(study), style="dim"))


def page(study: MethodStudy) -> str:
    """The same as a page in Markdown, with the papers."""
    lines = [f"# Methods on {study.model}", "", _shared(study), "", _line((*HEADINGS, "paper"))]
    lines.append(_line(["---"] * (len(HEADINGS) + 1)))
    lines += [_line((row.name, *_figures(row), row.note or row.loads_in, row.paper)) for row in study.rows]
    return "\n".join(lines) + "\n"


def calibration(study: CalibrationStudy) -> RenderableType:
    """The matrix of errors, the least agreement, and the verdict in words."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rounded on \\ judged on")
    for text in study.texts:
        table.add_column(text, justify="right")
    for text, row in zip(study.texts, study.error, strict=True):
        table.add_row(text, *(f"{value:.3f}" for value in row))
    lines = [f"{name.replace('_', ' ')}: {_range(matrix)}" for name, matrix in study.agreement.items()]
    shared = (
        f"output error over that of weights rounded on the text itself; {study.scheme}, {study.tokens:,} tokens each"
    )
    return Group(table, Text(shared, style="dim"), Text("\n".join(lines)), Text(study.verdict, style="bold"))


def caches(study: CacheStudy) -> RenderableType:
    """One row for each cache, and the flag that follows."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(("cache", "bits", "KL", "perplexity", "runs with")):
        table.add_column(heading, justify="right" if 0 < number < 4 else "left")
    for row in study.rows:
        figures = _number(row.bits, ".2f"), _number(row.kl, ".5f"), _number(row.perplexity, ".4g")
        table.add_row(row.name, *figures, row.note or row.flag)
    shared = f"{study.tokens:,} tokens of {study.text}, perplexity of the original {study.reference_perplexity:.4g}"
    return Group(table, Text(shared, style="dim"), Text(study.advice, style="bold"))


def _range(matrix: Sequence[Sequence[float]]) -> str:
    """The least and the largest value between different texts."""
    values = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    return f"{min(values):.3g} to {max(values):.3g}"


def _shared(study: MethodStudy) -> str:
    """What all rows have in common."""
    return (
        f"{study.scheme}; {study.tokens:,} tokens of {study.text}, perplexity of the original "
        f"{study.reference_perplexity:.4g}. Statistics: {study.statistics}. Of gptq's KL: at as many bits, between "
        "gptq's own with other groups and bits; empty outside of those."
    )


def _figures(row: MethodRow) -> tuple[str, ...]:
    """Bits, errors and costs in words; empty where there are none."""
    return (
        _number(row.bits, ".3f"),
        _number(row.output_error, ".5f"),
        _number(row.kl, ".4f"),
        _number(row.perplexity, ".4g"),
        _number(row.against_gptq, ".2f"),
        _number(row.cpu_seconds, ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    """A figure, or nothing."""
    return "" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
