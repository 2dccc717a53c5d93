"""Errors a user can act on: what (with numbers), where (stage, tensor, recipe key), and a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_GATE = 3
# What torch, C++, Python and oneDNN (the last) say when memory is not enough.
NO_MEMORY = (
    "not enough memory",
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",
)


class OutlierqError(Exception):
    """A mistake in the input or a limit of ours; the command line prints it without a traceback.

    what: one sentence with numbers. where: stage, tensor or recipe key. hint: what to try.
    """

    exit_code = EXIT_ERROR

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  while running {self.where}")
        if self.hint:
            lines.append(f"\nhint: {self.hint}")
        return "\n".join(lines)


class ArgumentError(OutlierqError):
    """A value that makes no sense for an argument. argument: its name in Python; the option is spelled with dashes."""

    exit_code = EXIT_USAGE

    def __init__(self, what: str, *, argument: str, hint: str | None = None):
        super().__init__(what, hint=hint)
        self.argument = argument


class SourceError(OutlierqError):
    """The checkpoint cannot be read as it is."""


class RecipeError(OutlierqError):
    """The recipe cannot be followed; `what` lists every fault found."""


class MethodError(OutlierqError):
    """A package's methods cannot be imported, or declare what cannot be."""


class StatsError(OutlierqError):
    """Calibration statistics are missing, foreign, or not finite."""


class NumbersError(OutlierqError):
    """A NaN or Inf in weights, statistics, scales or outputs."""


class OutputError(OutlierqError):
    """The output folder cannot be written, is in use, or failed its verification."""


class PublishError(OutlierqError):
    """A checkpoint is not fit to be published, or the Hub did not take it."""


class RankError(OutlierqError):
    """Another process of this run is gone."""


class GateError(OutlierqError):
    """A quality gate failed."""

    exit_code = EXIT_GATE


@contextmanager
def during(stage: str, subject: str) -> Iterator[None]:
    """Add "where" to any `OutlierqError` that passes through and has none yet."""
    try:
        yield
    except OutlierqError as error:
        if error.where is None:
            error.where = f"{stage} on {subject}"
        raise


@contextmanager
def hinted(hint: str) -> Iterator[None]:
    """Add a hint to any `OutlierqError` that passes through and has none yet."""
    try:
        yield
    except OutlierqError as error:
        error.hint = error.hint or hint
        raise


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the machine has not enough memory."""
    return isinstance(error, MemoryError) or any(part in str(error).lower() for part in NO_MEMORY)


def nearest(word: str, known: list[str]) -> str | None:
    """The known name closest to `word`, or None when nothing is close."""
    from difflib import get_close_matches

    matches = get_close_matches(word, known, n=1, cutoff=0.6)
    return matches[0] if matches else None
