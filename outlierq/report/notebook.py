"""Values as HTML for a notebook: the tables of the terminal, drawn as HTML tables. Importing this module is enough."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from outlierq.core.report import DRAWN
from outlierq.report import terminal
from outlierq.report.advice_text import advice
from outlierq.report.outlier_text import outlier_summary

if TYPE_CHECKING:
    from outlierq.core.report import Evaluation
    from outlierq.evaluate.comparison import Comparison
    from outlierq.pipeline.advising.recommend import Recommendation
    from outlierq.pipeline.diff import Difference
    from outlierq.pipeline.planning.plan import Plan
    from outlierq.pipeline.verify import Verification

FEW = 20  # faults and changed tensors shown; the value has all


def html(part: RenderableType) -> str:
    """HTML of what the terminal shows: a text, a table, or a group of them. Everything is escaped."""
    if isinstance(part, Group):
        return "".join(map(html, part.renderables))
    if isinstance(part, Table):
        return _table(part)
    text = _plain(part)
    return f"<p>{text}</p>" if text else ""


def _table(table: Table) -> str:
    """Columns and rows; figures are aligned to the right, totals are bold."""
    sides = ["right" if column.justify == "right" else "left" for column in table.columns]
    heads = [_plain(column.header) for column in table.columns]
    head = _row("th", heads, sides) if any(heads) else ""
    cells = zip(*(column.cells for column in table.columns), strict=True)
    rows = []
    for row, texts in zip(table.rows, cells, strict=True):
        plain = [_plain(text) for text in texts]
        rows.append(_row("td", [f"<b>{text}</b>" for text in plain] if row.style == "bold" else plain, sides))
    return f"<table>{head}{''.join(rows)}</table>"


def _row(tag: str, texts: list[str], sides: list[str]) -> str:
    """One row of escaped texts."""
    cells = (f'<{tag} style="text-align: {side}">{text}</{tag}>' for text, side in zip(texts, sides, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _plain(part: Any) -> str:
    """The escaped text of a cell, without styles."""
    return escape(part.plain if isinstance(part, Text) else str(part))


def plan(planned: Plan) -> Group:
    """What becomes of each kind of tensor, what is said of it, and what it will cost."""
    return Group(terminal.plan_of(planned), *terminal.expectations(planned, "the ceiling"))


def evaluation(measured: Evaluation) -> Group:
    """What was measured, on which text."""
    return Group(Text(f"{measured['model']} on {measured['text']}"), *terminal.evaluation(measured))


def comparison(compared: Comparison) -> Group:
    """Two checkpoints side by side, and their divergence where it was measured."""
    measured = compared.divergence
    parts = [terminal.comparison(compared, names=("a", "b")), *([terminal.divergence(measured)] if measured else [])]
    return Group(*parts)


def verification(result: Verification) -> Group:
    """The verdict, and the first faults."""
    verdict = "sound: no fault found" if result.sound else f"{len(result.faults)} fault(s) found"
    table = Table("check", "tensor", "fault")
    for fault in result.faults[:FEW]:
        table.add_row(*map(Text, (fault.check, fault.tensor, fault.what)))
    notes = [Text(f"note: {note}") for note in result.notes]
    return Group(Text(f"{result.source}: {verdict}"), *([table] if result.faults else []), *notes)


def difference(result: Difference) -> Group:
    """The tensors that changed most, and how many did what."""
    table = Table("changed", "relative error", "largest")
    for change in result.changed[:FEW]:
        figures = (change.relative_error, change.largest)
        table.add_row(Text(change.name), *("other shape" if value is None else f"{value:.3g}" for value in figures))
    counts = f"{len(result.added)} added, {len(result.removed)} removed, {len(result.changed)} changed"
    return Group(table, Text(f"{counts}, {result.equal} equal"))


def recommendation(made: Recommendation) -> Group:
    """The recipes, with their commands."""
    return Group(*(Text(part) if isinstance(part, str) else part for part in advice(made)))


DRAWN |= {
    "Comparison": lambda value: html(comparison(value)),
    "Difference": lambda value: html(difference(value)),
    "Evaluation": lambda value: html(evaluation(value)),
    "OutlierReport": lambda value: html(outlier_summary(value)),
    "Plan": lambda value: html(plan(value)),
    "Recommendation": lambda value: html(recommendation(value)),
    "Report": lambda value: html(terminal.summary(value)),
    "Verification": lambda value: html(verification(value)),
}
