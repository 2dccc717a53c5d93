"""Patterns for the names of modules: globs, or regular expressions after `re:`, as llm-compressor writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

EXPRESSION = "re:"
# `(.*)*`: Python tries every way to share a name among the repetitions.
REPEATED = re.compile(r"[*+}]\??\)(?:[*+]|\{\d*,)")
HEAD = "lm_head"
# Parts of a model that are no language model: a calibration text never reaches them, and no peer's recipe rounds them.
TOWERS = ("vision", "visual", "audio", "image", "projector", "multi_modal", "embed_vision", "embed_audio")


def tower_of(module: str) -> str | None:
    """The word in a module's name by which it belongs to a tower, or to what joins one to the language model."""
    return next((word for word in TOWERS if any(word in part for part in module.split("."))), None)


def words_of(tower: str) -> list[str]:
    """The words by which an override names a tower: the last part of its name, and the usual word in it."""
    usual = tower_of(tower)
    return [tower.rpartition(".")[2], *([usual] if usual else [])]


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a module. An expression need only fit its beginning, as in llm-compressor."""
    if pattern.startswith(EXPRESSION):
        return re.match(pattern.removeprefix(EXPRESSION), module) is not None
    return fnmatchcase(module, pattern)


def names_all(pattern: str, modules: Iterable[str]) -> bool:
    """Whether an expression spells out the ends of all modules that it fits, so that it fits none by accident.

    One that is open at its end, or inside, fits layers.10 where layers.1 was meant: `layers.1`, `layers.1.*proj$`, and
    by its first half `layers.1|proj$`.
    """
    expression = pattern.removeprefix(EXPRESSION)
    is_open = not expression.endswith("$") or any(sign in expression.removeprefix(".*") for sign in "*+?{")
    return not is_open and all(re.fullmatch(expression, module) for module in modules)


def sound(pattern: str) -> str:
    """The pattern; ValueError when its expression cannot be read, or may be tried in ever more ways on a name."""
    if pattern.startswith(EXPRESSION) and REPEATED.search(pattern):
        raise ValueError(f"repeats a part that ends in a repetition, which may take for ever (this is {pattern!r})")
    try:
        re.compile(pattern.removeprefix(EXPRESSION) if pattern.startswith(EXPRESSION) else "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error} (this is {pattern!r})") from error
    return pattern
