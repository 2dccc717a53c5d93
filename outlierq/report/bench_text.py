"""What `outlierq bench` measured, as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from outlierq.pipeline.bench import Benchmark, Timing

NAMES = {
    "w4": "W4A16 g128",
    "w4-g64": "W4A16 g64",
    "w4-g32": "W4A16 g32",
    "w4-asymmetric": "W4A16 g128 asym",
    "w8": "W8A16",
    "w8a8": "W8A8",
    "olive": "W4A16 OliVe",
}
MICROSECONDS = 1e6
WHY = (
    "* taken: the way that is on the whole nearest to the fastest from 1 to 256 tokens, measured once for this "
    "machine, torch and shape; it decodes blocks where that is faster. Not tried: 20 times slower with fewer tokens."
)


def bench(measured: Benchmark) -> RenderableType:
    """One row for each product. roofline: the share of what the machine allows; then, how many times faster it is than
    the 16-bit product, and than decoding the weight and multiplying. Below, all candidates.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("weight", no_wrap=True)
    for heading in ("out×in", "tokens", "time", "GB/s", "TOP/s", "roofline", "16-bit", "decoding"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in measured.timings:
        if before not in (None, (row.kind, row.shape)):
            table.add_section()
        before = (row.kind, row.shape)
        table.add_row(
            NAMES.get(row.kind, row.kind),
            f"{row.shape[0]}×{row.shape[1]}",
            str(row.tokens),
            _time(row.seconds),
            f"{row.nbytes / row.seconds / 1e9:.1f}",
            f"{row.operations / row.seconds / 1e12:.2f}",
            f"{row.roofline_seconds / row.seconds:.0%}",
            f"{row.dense_seconds / row.seconds:.2f}×",
            f"{row.decode_seconds / row.seconds:.2f}×",
        )
    ceilings = measured.ceilings
    peaks = (
        f"{measured.machine}: memory {ceilings.bytes_per_second / 1e9:.1f} GB/s, "
        f"16-bit {ceilings.flops_16bit / 1e12:.2f} TFLOP/s, int8 {ceilings.ops_int8 / 1e12:.2f} TOP/s (measured now)"
    )
    return Group(table, Text(peaks, style="dim"), *_candidates(measured))


def _candidates(measured: Benchmark) -> list[RenderableType]:
    """All ways of the CPU with their times, one table for all, and what they do not hold; nothing for a GPU."""
    if not measured.kernels and not measured.unfit:
        return []
    counts = sorted({row.tokens for row in measured.timings})
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("candidates, by tokens", no_wrap=True)
    for count in counts:
        table.add_column(str(count), justify="right", no_wrap=True)
    for kind, shape in dict.fromkeys((row.kind, row.shape) for row in measured.timings):
        rows = {row.tokens: row for row in measured.timings if (row.kind, row.shape) == (kind, shape)}
        table.add_section()
        table.add_row(Text(f"{NAMES.get(kind, kind)}, {shape[0]}×{shape[1]}", style="bold"))
        for name in dict.fromkeys(name for row in rows.values() for name in row.candidates):
            table.add_row(_titled(name, measured.kernels), *(_cell(rows[count], name) for count in counts))
        table.add_row("bfloat16 weight", *(_time(rows[count].dense_seconds) for count in counts))
    unfit = [
        Text(f"{NAMES.get(kind, kind)}: no {name}, {reason}", style="dim")
        for kind, reasons in measured.unfit.items()
        for name, reason in reasons.items()
    ]
    return [Text(), table, Text(WHY, style="dim"), *unfit, *map(Text, measured.notes)]


def _titled(name: str, kernels: Mapping[str, str]) -> str:
    """A candidate with the kernel that is behind it."""
    way, comma, rest = name.partition(",")
    return f"{way} ({kernels[way]}){comma}{rest}" if way in kernels and not rest else name


def _cell(row: Timing, name: str) -> str:
    """The time of a candidate; a star for the one that is taken."""
    if name not in row.candidates:
        return "not tried"
    return ("*" if name == row.taken else "") + _time(row.candidates[name])


def _time(seconds: float) -> str:
    """Microseconds or milliseconds with three digits."""
    micro = seconds * MICROSECONDS
    return f"{micro:.0f} µs" if micro < 1000 else f"{micro / 1000:.3g} ms"
