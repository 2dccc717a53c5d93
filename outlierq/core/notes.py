"""Notes for the report from deep inside a method: a fallback is written down, never silent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """Add a sentence to the notes of the site being worked on; without a collector it goes nowhere."""
    collected = _current.get()
    if collected is not None:
        collected.append(text)


def counted_together(noted: Iterable[tuple[str, str]]) -> list[str]:
    """Notes (where, what) as sentences: what holds at several places is said once, with the first and their number."""
    places: dict[str, list[str]] = {}
    for where, what in noted:
        places.setdefault(what, []).append(where)
    return [f"{at[0]}{f' and {len(at) - 1} more' if at[1:] else ''}: {what}" for what, at in places.items()]


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Collect every `note` made inside the block."""
    collected: list[str] = []
    token = _current.set(collected)
    try:
        yield collected
    finally:
        _current.reset(token)
