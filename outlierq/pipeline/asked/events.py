"""What a run tells while it works; the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """stage: "calibrate", "quantize", ... done, total: units of work (blocks); error: relative output error so far.

    step: what is being done for the unit at hand. share: how much of that is done, 0 to 1.
    """

    stage: str
    done: int
    total: int
    subject: str = ""
    error: float | None = None
    step: str = ""
    share: float = 0.0


Listener = Callable[[Event], None]


def fetching(listen: Listener) -> Callable[[int, int, str], None]:
    """Tells a listener of files that are fetched: how many were before, of how many, and the name of this one."""
    return lambda done, total, name: listen(Event("fetch", done, total, name))


def silent(event: Event) -> None:
    """A listener for runs that nobody watches."""
