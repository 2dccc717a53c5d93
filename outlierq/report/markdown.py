"""Text of others in Markdown: it means nothing there, neither as Markdown nor as HTML."""

from __future__ import annotations

import re
from typing import TypeVar

from outlierq.core.machine.printable import printable

T = TypeVar("T")
# What means something within a line of Markdown, or begins a block in a list; underscores inside of words do not.
MARKS = re.compile(r"[\\`*\[\]<>|~#&]|(?<!\w)_|_(?!\w)")


class Markdown(str):
    """Text that stands in the card as it is: ours, or checked before."""

    __slots__ = ()


def inline(value: T) -> T | Markdown:
    """What the template writes: any text that is not ours without meaning in Markdown or HTML, on one line."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return Markdown(MARKS.sub(r"\\\g<0>", printable(value, lines=False)))


def code(text: str) -> Markdown:
    """The text as code within a line."""
    text = printable(text, lines=False)
    fence = _fence(text, 1)
    return Markdown(f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}")


def fenced(language: str, text: str) -> Markdown:
    """The text as a block of code, which nothing in it ends."""
    fence = _fence(text, 3)
    return Markdown(f"{fence}{language}\n{printable(text)}{fence}")


def _fence(text: str, least: int) -> str:
    """More backticks than stand in a row anywhere in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
