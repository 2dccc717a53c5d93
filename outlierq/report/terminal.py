"""Reports as terminal tables: plain values in, rich renderables out.

Tables fit 80 columns: names fold, figures never do. Colour and bold come from rich, which drops them when the output
is not a terminal or NO_COLOR is set.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from outlierq.core.machine.printable import printable

if TYPE_CHECKING:
    from outlierq.core.limits import GateRow
    from outlierq.core.report import Evaluation, Report, SiteRow
    from outlierq.evaluate.comparison import Comparison
    from outlierq.evaluate.divergence import Divergence
    from outlierq.pipeline.fitting.frontier import Frontier
    from outlierq.pipeline.fitting.sweep import Sweep
    from outlierq.pipeline.planning.plan import Estimate, Plan, PlanRow

UNKNOWN = "–"
FEW_PARTS = 8  # a group with more members shows only itself
SIZES_SHOWN = 11  # of a frontier, beside the smallest
BUSY = 1.3  # times longer than on an idle machine, from which on that is said
PIPE_WIDTH = 100  # columns when nobody tells: a log file or a pipe
NARROW = 60  # columns below which the rows of a table are written one after the other

_DRAWING: ContextVar[Console | None] = ContextVar("drawing", default=None)


@contextmanager
def drawing() -> Iterator[Console]:
    """A console on stderr whose last lines change; what is printed meanwhile goes above them."""
    console = make_console(stderr=True)
    before = _DRAWING.set(console)
    try:
        yield console
    finally:
        _DRAWING.reset(before)


def make_console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console that is plain, and wide enough for whole rows, when it does not write to a terminal.

    While progress is drawn it is that one: any other would write into its lines.
    """
    drawn = _DRAWING.get()
    if drawn is not None and file is None and (stderr or sys.stdout.isatty()):
        return drawn
    console = _Harmless(file=file or (sys.stderr if stderr else sys.stdout), highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def plan(rows: Sequence[PlanRow], notes: Iterable[str] = ()) -> RenderableType:
    """What would be done to which sites, the size before and after, and what cannot be done."""
    table = _table("", "sites", "treatment", "#before", "#after", "#ratio")
    table.columns[0].justify = "right"
    for row in rows:
        sizes = (human_bytes(row.source_bytes), human_bytes(row.output_bytes))
        table.add_row(f"{row.count} ×", row.sites, row.treatment, *sizes, _ratio(row.source_bytes, row.output_bytes))
    before, after = sum(r.source_bytes for r in rows), sum(r.output_bytes for r in rows)
    table.add_section()
    table.add_row("", "total", "", human_bytes(before), human_bytes(after), _ratio(before, after), style="bold")
    return Group(table, *_notes(notes))


def plan_of(planned: Plan) -> RenderableType:
    """A plan with everything that is said of it."""
    clients = planned.clients
    first = [line for line in clients if line.startswith("transformers") and ": does not load" in line]
    return plan(planned.rows, [*first, *planned.notes, *(line for line in clients if line not in first)])


def expectations(planned: Plan, ceiling: str | int | None = None) -> list[str]:
    """The exact size of a planned output; memory and time, where they were asked for; what is done for a ceiling."""
    said = [
        f"output: {human_bytes(planned.output_bytes)} ({planned.output_bytes:,} bytes, exact) in "
        f"{len(planned.layout.sizes)} weight file(s), {planned.bits_per_weight:.2f} bits per weight"
    ]
    if planned.schemes:
        said.append(f"quantized: {planned.quantized_share:.1%} of the weights of linear layers")
    if planned.expected is not None:
        said += [_time(planned.expected), f"peak memory: at most {human_bytes(planned.expected.peak_bytes)}"]
    if planned.savings is not None:
        said.append(f"with --max-memory {ceiling}, memory stays below that:")
        said += [f"  {sentence}" for sentence in planned.savings] or ["  nothing has to be done for that"]
    return said


def _time(expected: Estimate) -> str:
    """How long it will take, and how long it would take on a machine with nothing else to do."""
    if expected.seconds is None:
        return "time: unknown for this recipe on this machine"
    said = f"time: about {rounded_seconds(expected.seconds)}, within a factor of two"
    if expected.waiting >= BUSY:
        alone = rounded_seconds(expected.alone or 0.0)
        said += f"; others keep this machine busy, alone it would be {alone}"
    return said


def summary(report: Report) -> RenderableType:
    """A whole run: what went in, before and after, the sites, where the time went, and what did not go as asked."""
    measured: Mapping[str, Any] = report.evaluation or {}
    head = Text.assemble((report.model, "bold"), " → ", (report.out, "bold"), (f"   {report.recipe}", "dim"))
    parts: list[RenderableType] = [head, before_after(report, measured.get("divergence"))]
    if report.rows:
        parts.append(sites(report.rows))
    if measured.get("tasks"):
        parts.append(tasks(measured["tasks"]))
    return Group(*_spaced(parts), *_notes(report.notes))


def before_after(report: Report, divergence: Divergence | Mapping[str, Any] | None = None) -> Table:
    """The one table to read: size, bits per weight, quality, time and memory."""
    table = _before_after_table()
    sizes = (human_bytes(report.source_bytes), human_bytes(report.output_bytes))
    table.add_row("size", *sizes, _times(report.source_bytes, report.output_bytes))
    table.add_row("bits per weight", _bits(report.source_bits_per_weight), _bits(report.bits_per_weight), "")
    if report.quantized_bits_per_weight is not None:
        table.add_row("  of the quantized weights", "", _bits(report.quantized_bits_per_weight), "")
        if report.quantized_share is not None:
            table.add_row("  quantized, of linear weights", "", f"{report.quantized_share:.1%}", "")
    if divergence is not None:
        _add_divergence(table, divergence)
    table.add_section()
    table.add_row("time", "", human_seconds(report.total_seconds), _slowest(report.seconds))
    if report.peak_bytes is not None:
        table.add_row("peak memory", "", human_bytes(report.peak_bytes), "")
    return table


def divergence(measured: Divergence | Mapping[str, Any]) -> RenderableType:
    """A measurement on its own, with the text it was made on."""
    values = _values(measured)
    table = _before_after_table()
    _add_divergence(table, values)
    size = f"{values['tokens']:,} tokens in {values['windows']} windows of {values['window_length']}"
    return Group(table, Text(f"{size}{begun_with(values)}, {human_seconds(values['seconds'])}", style="dim"))


def begun_with(measured: Mapping[str, Any]) -> str:
    """How windows begin and what is hidden of them, as the end of a sentence about them; empty for text as it is."""
    opening, mask = measured.get("opening"), measured.get("hidden_behind")
    said = f", each begun with {opening} as the tokenizer begins a text" if opening else ""
    return f"{said}, a random share of each hidden behind {mask} and predicted" if mask else said


def evaluation(measured: Evaluation) -> list[RenderableType]:
    """What was measured, on a text and in tasks, and the limits that were set."""
    shown: list[RenderableType] = [divergence(measured["divergence"])]
    if "tasks" in measured:
        shown.append(tasks(measured["tasks"], measured.get("reference_tasks")))
    if measured.get("samples"):
        shown.append(samples(measured["samples"]))
    if measured.gate_rows:
        shown.append(gate(measured.gate_rows))
    return shown


def samples(rows: Sequence[Mapping[str, str | None]]) -> Table:
    """What both models say to some prompts."""
    table = _Plain.grid(padding=(0, 2))
    for row in rows:
        for title in ("prompt", "before", "after"):
            if row[title] is not None:
                table.add_row(title, " ".join(str(row[title]).split()))
    return table


def sites(rows: Sequence[SiteRow], worst: int = 5) -> RenderableType:
    """Quality by kind of site, worst kind first, and below it the single worst sites."""
    return Group(*_spaced([_kinds(rows), _worst_sites(rows, worst)]))


def tasks(result: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> RenderableType:
    """Task results as `evaluate.tasks.run_tasks` returns them, beside those of the source when they are given."""
    rows, hidden = _shown(result["rows"])
    if before is None:
        table = _table("task", "metric", "#value", "#std. error", "#samples")
        for row in rows:
            table.add_row(*_task_name(row), _score(row["value"]), _error(row["stderr"]), _count(row["samples"]))
    else:
        table = _table("task", "metric", "#before", "#after", "#change", "#std. error")
        earlier = {(row["task"], row["metric"]): row["value"] for row in before["rows"]}
        for row in rows:
            first = earlier.get((row["task"], row["metric"]))
            change = UNKNOWN if first is None else f"{row['value'] - first:+.4f}"
            scores = (_score(first), _score(row["value"]), change, _error(row["stderr"]))
            table.add_row(*_task_name(row), *scores)
    remarks = [f"{hidden} rows of single subtasks are in the JSON report only"] if hidden else []
    remarks += _shortened(result.get("conditions", {}))
    return Group(table, *(Text(remark, style="dim") for remark in remarks)) if remarks else table


def _shortened(conditions: Mapping[str, Any]) -> list[str]:
    """That texts were cut to less than the model reads, which changes rolling perplexities."""
    length, positions = conditions.get("max_length"), conditions.get("positions")
    if length is None or positions is None or length >= positions:
        return []
    return [f"in contexts of {length:,} of the model's {positions:,} positions (lm-eval's default: --max-length 0)"]


def comparison(compared: Comparison, names: tuple[str, str] = ("before", "after")) -> RenderableType:
    """Two checkpoints: sizes, bits per weight, and how many tensors were stored in another way."""
    a, b = compared.a, compared.b
    table = _table("", f"#{names[0]}", f"#{names[1]}", "#change")
    table.add_row("size", human_bytes(a.nbytes), human_bytes(b.nbytes), _times(a.nbytes, b.nbytes))
    table.add_row("parameters", _short_count(a.parameters), _short_count(b.parameters), "")
    table.add_row("  quantized", _short_count(a.quantized_parameters), _short_count(b.quantized_parameters), "")
    table.add_row("bits per weight", _bits(a.bits_per_weight), _bits(b.bits_per_weight), "")
    quantized = (_bits(a.quantized_bits_per_weight), _bits(b.quantized_bits_per_weight))
    table.add_row("  of the quantized weights", *quantized, "")
    changed = f"{len(compared.changed)} stored in another way, {compared.unchanged} as before"
    moved = f"{len(compared.added)} added, {len(compared.removed)} removed"
    return Group(table, Text(f"tensors: {changed}, {moved}", style="dim"))


def frontier(found: Frontier) -> RenderableType:
    """About a dozen sizes between the smallest and the largest, what each costs, and what most weights are then."""
    table = _table("#size", "#bits", "#loss", "schemes, by weights")
    last = len(found.points) - 1
    for at in sorted({round(last * share / SIZES_SHOWN) for share in range(SIZES_SHOWN + 1)}):
        point, names = found.points[at], found.schemes(at)
        mix = ", ".join(f"{share:.0%} {name}" for name, share in names[:3])
        size = human_bytes(point.layers_bytes + found.other_bytes)
        table.add_row(size, f"{found.bits(point):.2f}", f"{point.loss:.3g}", mix + (" ..." if len(names) > 3 else ""))
    unit = (
        "KL per token in nats, predicted" if found.in_nats else "without a unit: the statistics hold no sensitivities"
    )
    return Group(table, Text(f"loss: {unit}; for {found.client}, {len(found.layers)} layers", style="dim"))


def sweep(swept: Sweep) -> RenderableType:
    """All recipes, the one with the least KL first."""
    titles, *rows = swept.cells()
    table = _table(titles[0], *(f"#{title}" for title in titles[1:-1]), titles[-1])
    for row in rows:
        table.add_row(*row)
    original = f"original: {human_bytes(swept.source_bytes)}"
    return Group(
        table, Text(original + ("" if swept.perplexity is None else f", perplexity {swept.perplexity:.3f}"), "dim")
    )


def gate(rows: Sequence[GateRow]) -> Table:
    """The quality limits and whether they were kept."""
    table = _table("", "limit on", "#value", "#limit")
    for row in rows:
        mark = Text("passed", style="green") if row.passed else Text("FAILED", style="bold red")
        table.add_row(mark, row.name, f"{row.value:.5g}", f"{'≤' if row.relation == '<=' else '≥'} {row.limit:.5g}")
    return table


def human_bytes(count: int) -> str:
    """Three significant figures and decimal units, as the Hugging Face Hub shows them: 1.23 GB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{_three_figures(value)} {unit}"


def human_seconds(seconds: float) -> str:
    """As a person would say it: 0.42 s, 12.3 s, 3 min 20 s, 1 h 02 min, 3 days 4 h."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} days {hours % 24} h"


def rounded_seconds(seconds: float) -> str:
    """The same without parts of a second, for time that is still running."""
    return f"{seconds:.0f} s" if seconds < 59.5 else human_seconds(max(60, round(seconds)))


def _add_divergence(table: Table, measured: Divergence | Mapping[str, Any]) -> None:
    """Perplexity, and where there is a reference what changed against it."""
    values = _values(measured)
    table.add_section()
    before = values["reference_perplexity"]
    if before is None:
        table.add_row("perplexity", "", f"{values['perplexity']:.3f}", "")
        return
    increase = f"{100 * (values['perplexity'] / before - 1):+.2f} %"
    table.add_row("perplexity", f"{before:.3f}", f"{values['perplexity']:.3f}", increase)
    error = values["kl_standard_error"]
    decimals = 4 if values["kl_per_token"] >= 0.01 else 6  # int8 stays below 0.001
    spread = "" if error is None else f"± {error:.{decimals}f}"
    table.add_row("KL divergence per token", "", f"{values['kl_per_token']:.{decimals}f} nats", spread)
    flips = f"{values['flips_to_wrong']:,} lost, {values['flips_to_right']:,} won"
    table.add_row("top-1 agreement", "", f"{100 * values['top1_agreement']:.2f} %", flips)
    errors: list[float] = list(values.get("hidden_errors", ()))
    if len(errors) > 1:
        steps = [after / before if before > 0 else 0.0 for before, after in pairwise(errors)]
        most = max(range(len(steps)), key=steps.__getitem__) + 1
        table.add_row("error of hidden states", "", f"{errors[-1]:.2g}", f"most in block {most}")


def _kinds(rows: Sequence[SiteRow]) -> Table:
    """One line per (last part of the site's name, method, scheme), worst error first."""
    name, error = _error_of(rows)
    groups: dict[tuple[str, str], list[SiteRow]] = {}
    for row in rows:
        groups.setdefault((row.site.rpartition(".")[2], f"{row.method} {_scheme(row)}"), []).append(row)
    ranked = sorted(groups.items(), key=lambda item: -_mean([error(row) for row in item[1]]))
    means = _percents([_mean([error(row) for row in members]) for _, members in ranked])
    worst = _percents([max(error(row) for row in members) for _, members in ranked])
    table = _table("sites", "#count", "treatment", "#bits", f"#mean {name}", "#worst")
    for ((kind, treatment), members), mean, highest in zip(ranked, means, worst, strict=True):
        bits = _bits(_mean([row.bits_per_weight for row in members]))
        table.add_row(kind, str(len(members)), treatment, bits, mean, highest)
    return table


def _worst_sites(rows: Sequence[SiteRow], count: int) -> Table:
    """The sites with the largest error, with their notes where there are any."""
    name, error = _error_of(rows)
    ranked = sorted(rows, key=error, reverse=True)[:count]
    noted = any(row.note for row in ranked)
    table = _table("worst sites", f"#{name}", *(["note"] if noted else []))
    for row, share in zip(ranked, _percents([error(row) for row in ranked]), strict=True):
        table.add_row(row.site, share, *([row.note] if noted else []))
    return table


def _error_of(rows: Sequence[SiteRow]) -> tuple[str, Callable[[SiteRow], float]]:
    """Which error all of `rows` have: the output error, or in a data-free run the weight error."""
    if any(row.output_error is None for row in rows):
        return "weight error", lambda row: row.weight_error
    return "output error", lambda row: row.output_error or 0.0


def _scheme(row: SiteRow) -> str:
    """As short as it goes: int4 g128, int3 channel asym."""
    group = "channel" if row.group_size is None else f"g{row.group_size}"
    return f"{row.numbers or f'int{row.bits}'} {group}" + ("" if row.symmetric else " asym")


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    """Fallbacks and warnings below an empty line, with a hanging indent."""
    table = _Plain.grid(padding=(0, 2))
    for note in notes:
        table.add_row(Text("note", style="yellow"), note)
    return [Text(""), table] if table.row_count else []


def _slowest(seconds: Mapping[str, float]) -> str:
    """The stage that took most of the time."""
    if len(seconds) < 2:
        return ""
    stage = max(seconds, key=seconds.__getitem__)
    return f"{stage} {human_seconds(seconds[stage])}"


class _Harmless(Console):
    """A console that makes visible what a terminal would act on; only rich's own styles get through as such."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _Plain(Table):
    """A table that shows text as it is: square brackets in names and notes are not rich's markup."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        texts = (Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells)
        super().add_row(*texts, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < NARROW and len(self.columns) > 3
        yield from self._one_by_one() if narrow else super().__rich_console__(console, options)

    def _one_by_one(self) -> Iterator[Text]:
        """Every row as a text that may be broken anywhere: columns of a few letters cannot be read."""
        yield self._joined([column.header for column in self.columns], "dim")
        for row, cells in zip(self.rows, zip(*(column.cells for column in self.columns), strict=True), strict=True):
            yield self._joined(cells, str(row.style or ""))

    @staticmethod
    def _joined(cells: Iterable[RenderableType], style: str) -> Text:
        parts = [cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells]
        return Text(" · ", style).join(part for part in parts if part.plain)


def _before_after_table() -> Table:
    """A table whose "after" column stands out."""
    table = _table("", "#before", "#after", "#change")
    table.columns[2].style = "bold"
    table.columns[3].style = "cyan"
    return table


def _table(*titles: str) -> Table:
    """An open table. A title that starts with "#" heads a column of figures: right-aligned and never wrapped."""
    table = _Plain(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for title in titles:
        if title.startswith("#"):
            table.add_column(Text(title.removeprefix("#")), justify="right", no_wrap=True)
        else:
            table.add_column(Text(title), overflow="fold")
    return table


def _spaced(parts: Iterable[RenderableType]) -> list[RenderableType]:
    """The parts with an empty line before each but the first."""
    return [item for part in parts for item in (Text(""), part)][1:]


def _values(measured: Divergence | Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain values of a measurement that may come from memory or from a report file."""
    return measured if isinstance(measured, Mapping) else measured.to_dict()


def _ratio(before: int, after: int) -> str:
    """How many times smaller, as a figure for a column named "ratio"."""
    return f"{before / after:.2f}×"


def _times(before: int, after: int) -> str:
    """The same with the word that says which way."""
    return f"{_ratio(before, after)} smaller" if before >= after else f"{_ratio(after, before)} larger"


def _bits(value: float | None) -> str:
    """Bits per weight."""
    return UNKNOWN if value is None else f"{value:.2f}"


def _percents(shares: Sequence[float]) -> list[str]:
    """Shares as percentages with the same number of decimals, three figures for the largest."""
    largest = max(shares, default=0.0)
    decimals = 2 if largest <= 0 else min(max(0, 2 - math.floor(math.log10(100 * largest))), 6)
    return [f"{100 * share:.{decimals}f} %" for share in shares]


def _three_figures(value: float) -> str:
    """1.23, 12.3, 123."""
    rounded = float(f"{value:.3g}")  # first, so that 0.9996 counts as 1
    decimals = 2 if rounded == 0 else max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{decimals}f}"


def _short_count(count: int) -> str:
    """135 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= limit:
            return _three_figures(count / limit) + unit
    return str(count)


def _shown(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """Rows of what was asked for and of its parts while they are few, and how many rows are left out."""
    parents = {row["task"]: row["parent"] for row in rows}
    parts = Counter(row["parent"] for row in rows)
    shown = [
        row
        for row in rows
        if row["parent"] is None or (parents.get(row["parent"]) is None and parts[row["parent"]] <= FEW_PARTS)
    ]
    return shown, len(rows) - len(shown)


def _task_name(row: Mapping[str, Any]) -> tuple[str, str]:
    """Task, indented when it is a part, and metric."""
    return row["task"] if row["parent"] is None else f"  {row['task']}", row["metric"]


def _score(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def _error(value: float | None) -> str:
    return UNKNOWN if value is None else f"± {value:.4f}"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
