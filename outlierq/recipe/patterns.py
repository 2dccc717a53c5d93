"""Patterns for the names of modules: globs, or regular expressions after `re:`, as llm-compressor writes them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

EXPRESSION = "re:"
HEAD = "lm_head"


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a module. An expression need only fit its beginning, as in llm-compressor."""
    if pattern.startswith(EXPRESSION):
        return re.match(pattern.removeprefix(EXPRESSION), module) is not None
    return fnmatchcase(module, pattern)


def sound(pattern: str) -> str:
    """The pattern; ValueError when its expression cannot be read."""
    try:
        re.compile(pattern.removeprefix(EXPRESSION) if pattern.startswith(EXPRESSION) else "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error} (this is {pattern!r})") from error
    return pattern
