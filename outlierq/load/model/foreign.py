"""Faults of the tokenizers library as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief

USUAL = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError, RuntimeError)


@contextmanager
def tokenizer_faults(source: str) -> Iterator[None]:
    """SourceError when the tokenizer of `source` cannot be used.

    The library is written in Rust: it raises a plain `Exception` for most faults, and its panics are not even that.
    Every other exception passes.
    """
    try:
        yield
    except BaseException as error:
        ours = type(error) is Exception or type(error).__name__ == "PanicException" or isinstance(error, USUAL)
        if not ours or isinstance(error, SourceError):
            raise
        raise SourceError(
            f"the tokenizer of {source} cannot be loaded: {brief(error, 300)}",
            hint="the source must hold its tokenizer files (tokenizer.json or tokenizer.model)",
        ) from error
