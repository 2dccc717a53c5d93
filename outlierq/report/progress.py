"""How far a job is: a bar on a terminal, one line that changes in a notebook, now and then a line anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlierq.pipeline.asked.events import Event, Listener

SECONDS_BETWEEN_LINES = 10


@contextmanager
def listening(progress: bool | Listener | None) -> Iterator[Listener]:
    """The listener that is asked for. True: what fits the place; False or None: nobody; else the listener itself."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda event: None
    elif in_notebook():
        yield line_in_notebook()
    elif sys.stderr.isatty():
        with bar() as listen:
            yield listen
    else:
        yield lines(lambda text: print(text, file=sys.stderr))


def in_notebook() -> bool:
    """Whether a notebook shows what this process says. It has loaded IPython then, so that is not imported here."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


@contextmanager
def bar() -> Iterator[Listener]:
    """Blocks done, time gone and left, the step, error so far, peak memory. It appears with the first event."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from outlierq.report.terminal import make_console

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    drawn = Progress(*columns, console=make_console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def listen(event: Event) -> None:
        drawn.start()
        if event.stage not in tasks:
            tasks[event.stage] = drawn.add_task(event.stage, total=event.total, figures="")
        completed = event.done + event.share
        drawn.update(tasks[event.stage], completed=completed, total=event.total, figures=_figures(event, "  "))

    try:
        yield listen
    finally:
        drawn.stop()


def lines(write: Callable[[str], object]) -> Listener:
    """At most one line every ten seconds and one when a stage begins, for logs."""
    began: dict[str, float] = {}
    at = 0.0

    def listen(event: Event) -> None:
        nonlocal at
        now = time.monotonic()
        if event.stage in began and now - at < SECONDS_BETWEEN_LINES:
            return
        at = now
        gone = now - began.setdefault(event.stage, now)
        write(f"{event.stage} {event.done}/{event.total}, {gone:.0f} s, {_figures(event, ', ')}")

    return listen


def line_in_notebook() -> Listener:
    """One line below the cell, which is replaced at each event."""
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)

    def listen(event: Event) -> None:
        share = f'<progress value="{event.done}" max="{event.total}"></progress>'
        handle.update(HTML(f"{event.stage} {share} {event.done}/{event.total}, {_figures(event, ', ')}"))

    return listen


def _figures(event: Event, separator: str) -> str:
    """What is being done, the error so far where there is one, and the largest memory."""
    from outlierq.core.machine.heap import peak_bytes
    from outlierq.report.terminal import human_bytes

    error = f"error {event.error:.2%}{separator}" if event.error is not None else ""
    step = f"{event.step}{f' {event.share:.0%}' if event.share else ''}{separator}" if event.step else ""
    return f"{step}{error}peak {human_bytes(peak_bytes())}"
