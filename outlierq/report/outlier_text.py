"""The outlier report on a terminal: findings in words, a row for every kind of input, the worst inputs and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from outlierq.core.measured.outliers import GroupOutliers, OutlierReport
from outlierq.report.terminal import UNKNOWN, _notes, _spaced, _table, human_seconds

STYLES = {"calm": "green", "watch": "yellow", "dangerous": "bold red"}
ORDER = ("dangerous", "watch", "calm")
WORST = 8
# A measure that is missing for the same reason at many places is one line.
PLACES = 3


def outlier_summary(report: OutlierReport) -> RenderableType:
    """The whole report, short enough to read."""
    head = Text.assemble((report.model, "bold"), (f"   {report.statistics}", "dim"))
    parts: list[RenderableType] = [head, _findings(report.summary), _roles(report.groups)]
    worst = _worst(report.groups)
    if worst.row_count:
        parts.append(worst)
    parts.append(Text(f"{len(report.groups)} inputs measured in {human_seconds(report.seconds)}", style="dim"))
    return Group(*_spaced(parts), *_notes([*report.notes, *missing_lines(report)]))


def missing_lines(report: OutlierReport) -> list[str]:
    """What could not be measured, why, and where; places with the same reason together."""
    places: dict[str, list[str]] = {}
    for group in report.groups:
        for entry in group.missing:
            places.setdefault(entry, []).append(group.group)
    for block in report.blocks:
        for entry in block.missing:
            places.setdefault(entry, []).append(f"block {block.block}")
    return [f"not measured: {entry} [{_some(where)}]" for entry, where in places.items()]


def _some(where: Sequence[str]) -> str:
    """A few places, and how many more."""
    more = f" and {len(where) - PLACES} more" if len(where) > PLACES else ""
    return ", ".join(where[:PLACES]) + more


def _findings(summary: Iterable[str]) -> Table:
    """One sentence a row with a hanging indent."""
    table = Table.grid(padding=(0, 1))
    for sentence in summary:
        table.add_row("•", Text(sentence, style="bold red" if sentence.startswith("Dangerous") else ""))
    return table


def _roles(groups: Sequence[GroupOutliers]) -> Table:
    """The inputs of one kind over all blocks: largest figures, and the predicted errors at the worst."""
    table = _table("input of", "#inputs", "danger", "#ratio", "#kurtosis", "#W8A8", "#remedied", "#W4A16")
    by_role: dict[str, list[GroupOutliers]] = {}
    for group in groups:
        by_role.setdefault(group.role, []).append(group)
    for role, some in by_role.items():
        count: Counter[str] = Counter(group.danger for group in some)
        danger = Text(", ").join(Text(f"{count[d]} {d}", style=STYLES[d]) for d in ORDER if count[d])
        figures = [_largest(g.measures.get("channel_ratio") for g in some), _largest(_kurtosis(g) for g in some)]
        errors = [_percent(g.errors.get("w8a8") for g in some), _percent(map(after_remedy, some))]
        table.add_row(role, str(len(some)), danger, *figures, *errors, _percent(g.errors.get("w4a16") for g in some))
    return table


def _kurtosis(group: GroupOutliers) -> float | None:
    return group.measures.get("kurtosis")


def after_remedy(group: GroupOutliers) -> float | None:
    """The W8A8 error with the group's remedy; as it is when it needs none; None when nothing was predicted."""
    if group.remedy == "16 bits":
        return 0.0
    return group.errors.get(f"w8a8 {group.remedy}" if group.remedy else "w8a8")


def _worst(groups: Sequence[GroupOutliers]) -> Table:
    """The inputs with most danger, why, and what to do."""
    table = _table("worst inputs", "why", "do")
    ranked = sorted(groups, key=lambda g: (ORDER.index(g.danger), -g.errors.get("w8a8", 0.0)))
    for group in ranked[:WORST]:
        if group.danger != "calm":
            why = Text("; ".join(group.reasons[:2]))
            table.add_row(Text(group.group, style=STYLES[group.danger]), why, group.remedy or UNKNOWN)
    return table


def _largest(values: Iterable[float | None]) -> str:
    """The largest of the values that are there."""
    known = [value for value in values if value is not None]
    return f"{max(known):,.3g}" if known and max(known) < 1000 else f"{max(known):,.0f}" if known else UNKNOWN


def _percent(values: Iterable[float | None]) -> str:
    """The largest of the values that are there, as a share."""
    known = [value for value in values if value is not None]
    return f"{max(known):.2%}" if known else UNKNOWN
