"""What `outlierq bench` measured, as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from outlierq.pipeline.bench import Ceilings, Timing

NAMES = {"w4": "W4A16 g128", "w8": "W8A16", "w8a8": "W8A8"}
MICROSECONDS = 1e6


def bench(ceilings: Ceilings, timings: Sequence[Timing], machine: str) -> RenderableType:
    """One row for each product. roofline: the share of what the machine allows; then, how many times faster it is than
    the 16-bit product, and than decoding the weight and multiplying.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("weight", no_wrap=True)
    for heading in ("out×in", "tokens", "time", "GB/s", "TOP/s", "roofline", "16-bit", "decoding"):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in timings:
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
    peaks = (
        f"{machine}: memory {ceilings.bytes_per_second / 1e9:.1f} GB/s, "
        f"16-bit {ceilings.flops_16bit / 1e12:.2f} TFLOP/s, int8 {ceilings.ops_int8 / 1e12:.2f} TOP/s (measured now)"
    )
    return Group(table, Text(peaks, style="dim"))


def _time(seconds: float) -> str:
    """Microseconds or milliseconds with three digits."""
    micro = seconds * MICROSECONDS
    return f"{micro:.0f} µs" if micro < 1000 else f"{micro / 1000:.3g} ms"
