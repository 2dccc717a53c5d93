"""What `outlierq recommend` says, for a terminal: one paragraph a recipe, the command on a line of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from outlierq.core.machine.printable import printable
from outlierq.report.terminal import _notes, _Plain, human_bytes

if TYPE_CHECKING:
    from outlierq.pipeline.advising.recommend import Recommendation, Suggestion


def advice(made: Recommendation) -> list[RenderableType]:
    """The recipes in order, and what was passed over. Strings are commands, which must not be folded or cut."""
    card = made.card
    memory = "" if card.memory is None else f", {human_bytes(card.memory)}"
    head = Text(printable(f"{made.model} for {made.client} on {card.name} ({card.words}{memory})"), style="bold")
    parts = [part for number, each in enumerate(made.suggestions, 1) for part in _suggestion(number, each)]
    others = [f"not {line}" for line in made.passed_over]
    dated = f"facts of {made.checked}; no card was measured here"
    return [head, *parts, *_notes([*made.remarks, *others, dated])]


def _suggestion(number: int, each: Suggestion) -> Iterator[RenderableType]:
    """One recipe, with its commands."""
    yield Text("")
    yield Text.assemble((f"{number}. {each.recipe}", "bold"), (f"   for {each.goal}", "dim"))
    small, large = sorted((each.source_bytes, each.output_bytes))
    ratio = f"{large / max(1, small):.2f} times {'smaller' if small == each.output_bytes else 'larger'}"
    exact = f"{human_bytes(each.output_bytes)} ({each.output_bytes:,} bytes, exact), {ratio}"
    table = _Plain.grid(padding=(0, 2, 0, 2))
    table.add_row("why", each.why)
    table.add_row("size", f"{exact}, {each.bits_per_weight:.2f} bits per weight")
    table.add_row("fits", each.fit.words)
    table.add_row("loss", each.expected.words)
    table.add_row("client", each.client)
    yield table
    yield f"    {each.command}"
    yield f"    {each.then}"
