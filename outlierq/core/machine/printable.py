"""Text from anywhere made harmless to show: what a terminal, a page or a log would act on becomes a visible escape.

Names in a checkpoint, paths and messages of libraries may hold anything: an escape sequence sets a terminal's title or
its clipboard, a bidi override turns a line around, half a character (a path that is not UTF-8) cannot be written at
all, and a control character is no XML.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

T = TypeVar("T")

# Kinds of characters that act instead of being seen: controls, format marks (bidi among them), halves of characters,
# line and paragraph separators.
ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Joiners, which scripts of India and composed emoji need: they act on their neighbours only.
JOINERS = "\u200c\u200d"
LINES = "\n\t"
HALF = re.compile("[\ud800-\udfff]")
# Bytes of a path that are no UTF-8, as Python holds them in a text (PEP 383).
FIRST_BYTE, LAST_BYTE, BYTE_OFFSET = "\udc80", "\udcff", 0xDC00
# What a narrow encoding shows instead: as short as it can be, for columns to stay below each other.
STAND_INS = {
    "→": "->", "×": "x", "≤": "<=", "≥": ">=", "±": "+-", "≈": "~", "µ": "u", "μ": "u", "²": "2", "·": "-", "•": "*",
    "–": "-", "—": "-", "−": "-", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "█": "#",
}  # fmt: skip
BOX_DRAWING = range(0x2500, 0x2580)


def printable(text: str, *, lines: bool = True) -> str:
    """The text with every character that acts instead of being seen as an escape: `\\x1b`, `\\u202e`.

    Bytes of a path that are not UTF-8 become `\\xe9`. lines: newlines and tabs stay what they are.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_harmless(char, lines) else _escape(char) for char in text)


def representable(text: str, encoding: str) -> str:
    """The text in characters that an encoding has: box drawing and signs have plain stand-ins, others escapes."""
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return "".join(_in(char, encoding) for char in text)


def whole_characters(value: T) -> T:
    """A tree of plain values whose texts any encoding of Unicode can hold: bytes that are not UTF-8 become `\\xe9`."""
    return over_texts(value, lambda text: HALF.sub(lambda half: _escape(half.group()), text))


def over_texts(value: T, change: Callable[[str], str]) -> T:
    """A tree of plain values with every text changed, keys as well; tuples become lists, as in JSON."""
    changed: object = value
    if isinstance(value, str):
        changed = change(value)
    elif isinstance(value, Mapping):
        changed = {over_texts(key, change): over_texts(child, change) for key, child in value.items()}
    elif isinstance(value, list | tuple):
        changed = [over_texts(child, change) for child in value]
    return cast("T", changed)


def _is_harmless(char: str, lines: bool) -> bool:
    if char in LINES:
        return lines
    # The last two code points of each plane are no characters at all, and XML forbids them.
    return (unicodedata.category(char) not in ACTING or char in JOINERS) and ord(char) & 0xFFFE != 0xFFFE


def _escape(char: str) -> str:
    """A character as Python would write it in a literal."""
    number = ord(char) - BYTE_OFFSET if FIRST_BYTE <= char <= LAST_BYTE else ord(char)
    if char in LINES:
        return {"\n": "\\n", "\t": "\\t"}[char]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _in(char: str, encoding: str) -> str:
    """One character, or what stands for it."""
    try:
        char.encode(encoding)
        return char
    except UnicodeEncodeError:
        pass
    if ord(char) in BOX_DRAWING:
        return {"─": "-", "━": "-", "│": "|", "┃": "|"}.get(char, "+")
    return STAND_INS.get(char) or _escape(char)
