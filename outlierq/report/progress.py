"""How far a job is: two lines that change on a terminal or in a notebook, a line now and then anywhere else.

All of them say the same: stage, units done, time gone and left, the step inside the unit, error so far, memory. They go
on by themselves while nothing is told, so that a long step is not taken for a dead one.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from outlierq.report.course import BEGINNING, Course, Standing

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from outlierq.pipeline.asked.events import Event, Listener

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_CELLS = 1.0  # of what a notebook shows
LONG_STEP = 5.0  # seconds from which on it is said how long a step has been going on
MOST_BAR, LEAST_BAR = 32, 8


@contextmanager
def listening(progress: bool | Listener | None) -> Iterator[Listener]:
    """The listener that is asked for. True: what fits the place; False or None: nobody; else the listener itself."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda event: None
    elif in_notebook():
        with in_cell() as listen:
            yield listen
    elif on_terminal():
        with bar() as listen:
            yield listen
    else:
        with lines(say) as listen:
            yield listen


def in_notebook() -> bool:
    """Whether a notebook shows what this process says. It has loaded IPython then, so that is not imported here."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


def on_terminal() -> bool:
    """Whether stderr is a terminal on which lines can change."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # None, or closed
        return False


def say(text: str) -> None:
    """A line on stderr, where there is one: nobody who closed it wants a job to end for that."""
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr)
    except (OSError, ValueError):
        pass  # closed, or its reader is gone


@contextmanager
def lines(write: Callable[[str], object], *, steps: bool = False) -> Iterator[Listener]:
    """A line when a stage begins, and every ten seconds, for logs. steps: one for every step, too."""
    course, lock, said = Course(), threading.Lock(), set[object]()
    words(course.standing())  # imports what it needs: the other thread must not, while this one may import torch

    def line() -> None:
        with lock:
            write(" · ".join(words(course.standing())))

    with repeated(line, SECONDS_BETWEEN_LINES) as again:

        def listen(event: Event) -> None:
            course.listen(event)
            stage = course.standing().stage
            about = (stage, event.done, event.step) if steps and event.step else stage
            if about not in said:
                said.update({stage, about})
                again()
                line()

        yield listen


@contextmanager
def bar() -> Iterator[Listener]:
    """Two lines at the end of a terminal, gone when all is done; they fit 40 columns, and need no colour."""
    from rich.live import Live

    from outlierq.report.terminal import drawing

    course = Course()
    with drawing() as console:
        shown = Live(_Drawn(course), console=console, transient=True, redirect_stdout=sys.stdout.isatty())
        with shown:
            yield course.listen


@contextmanager
def in_cell() -> Iterator[Listener]:
    """Two lines below a notebook's cell; plain text where HTML is not shown."""
    from IPython.display import display

    course = Course()
    handle = display(cell(course.standing()), raw=True, display_id=True)

    def show() -> None:
        handle.update(cell(course.standing()), raw=True)

    with repeated(show, SECONDS_BETWEEN_CELLS):
        yield course.listen
    show()


def cell(standing: Standing) -> dict[str, str]:
    """What a notebook shows, by media type."""
    parts = words(standing)
    share = f'<progress value="{standing.place:.2f}" max="{standing.total}"></progress> ' if standing.total else ""
    return {"text/plain": " · ".join(parts), "text/html": share + escape(" · ".join(parts))}


@contextmanager
def repeated(action: Callable[[], object], seconds: float) -> Iterator[Callable[[], None]]:
    """Inside, another thread acts whenever so much time has passed; what is given begins that time anew.

    Where there is no room for a thread nothing is repeated.
    """
    from outlierq.core.machine.threads import check_room

    wake, over = threading.Event(), False

    def run() -> None:
        while not over:
            if not wake.wait(seconds):
                action()
            wake.clear()

    try:
        check_room(1)
        thread = threading.Thread(target=run, name="progress", daemon=True)
        thread.start()
    except (MemoryError, RuntimeError):
        yield lambda: None
        return
    try:
        yield wake.set
    finally:
        over = True
        wake.set()
        thread.join()


def words(standing: Standing) -> list[str]:
    """All that is known, in the order in which it is wanted."""
    step = _step(standing)
    return [_count(standing), *_times(standing), *([step] if step else []), *_figures(standing)]


def _count(standing: Standing) -> str:
    return f"{standing.stage} {standing.done}/{standing.total}" if standing.total else standing.stage


def _times(standing: Standing) -> list[str]:
    """Time gone, and left where units that are done say something of it."""
    from outlierq.report.terminal import rounded_seconds

    left = [] if standing.left is None else [f"about {rounded_seconds(standing.left)} left"]
    return [rounded_seconds(standing.gone), *left]


def _step(standing: Standing) -> str:
    """The step, and how far it is or how long it has been going on."""
    from outlierq.report.terminal import rounded_seconds

    if not standing.step:
        return ""
    if standing.in_step >= LONG_STEP:
        return f"{standing.step} for {rounded_seconds(standing.in_step)}"
    return f"{standing.step} {standing.share:.0%}" if standing.share else standing.step


def _figures(standing: Standing) -> list[str]:
    """The error so far, where there is one, and the largest memory."""
    from outlierq.core.machine.heap import peak_bytes
    from outlierq.report.terminal import human_bytes

    error = [] if standing.error is None else [f"error {standing.error:.2%}"]
    return [*error, f"peak {human_bytes(peak_bytes())}"]


class _Drawn:
    """The two lines, as wide as the terminal is at the time."""

    def __init__(self, course: Course):
        self._course = course

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        standing, width = self._course.standing(), options.max_width - 1  # the last column wraps on some terminals
        yield _head(standing, width)
        if standing.stage != BEGINNING.stage:
            yield _foot(standing, width)


def _head(standing: Standing, width: int) -> Text:
    """Stage, bar, count, time gone and left; without the bar, and then the time gone, where there is no room."""
    from rich.text import Text

    count = f" {standing.done}/{standing.total}" if standing.total else ""
    times = _times(standing)
    gone = times[0] if len(times) == 1 else f"{times[0]} gone"
    after = f"{count}  {', '.join([gone, *times[1:]])}"
    if len(standing.stage) + LEAST_BAR + 1 + len(after) > width and len(times) > 1:
        after = f"{count}  {times[1]}"
    room = min(MOST_BAR, width - len(standing.stage) - 1 - len(after))
    line = Text(standing.stage, style="bold", no_wrap=True)
    if standing.total and room >= LEAST_BAR:
        line.append(" ").append(_filled(standing.place / standing.total, room))
    line.append(after, style="default")
    line.truncate(width, overflow="ellipsis")
    return line


def _filled(share: float, width: int) -> Text:
    from rich.text import Text

    done = round(share * width)
    return Text("━" * done, style="cyan").append("╌" * (width - done), style="dim")


def _foot(standing: Standing, width: int) -> Text:
    """What is being done; a long step is cut, so that figures stay."""
    from rich.text import Text

    figures = " · ".join(_figures(standing))
    step, room = Text(_step(standing)), width - len(figures) - 5
    line = Text("  ", no_wrap=True, style="dim")
    if step and room >= LEAST_BAR:
        step.truncate(room, overflow="ellipsis")
        line.append(step).append(" · ")
    line.append(figures).truncate(width, overflow="ellipsis")
    return line
