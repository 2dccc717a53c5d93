"""Faults inside a model's own code: one sentence that names the module, and not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING

from outlierq.core.errors import OutlierqError, lacks_memory
from outlierq.core.machine.untrusted import brief

if TYPE_CHECKING:
    import torch

FAULTS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError)


@contextmanager
def forward_of(model: torch.nn.Module, stage: str) -> Iterator[None]:
    """OutlierqError for what torch or the model's code raises inside; a lack of memory passes, it has its own words."""
    try:
        yield
    except FAULTS as error:
        if lacks_memory(error):
            raise
        said = str(error).strip().partition("\n")[0] or "no reason is given"
        raise OutlierqError(
            f"{type(model).__name__} fails in its own code: {type(error).__name__}: {brief(said, 200)}",
            where=f"{stage} on {_innermost(model, error)}",
            hint="--debug shows the line; does the model run in transformers with this config.json?",
        ) from error


def _innermost(model: torch.nn.Module, error: BaseException) -> str:
    """The name of the last module in whose code the error passed."""
    names = {id(part): name for name, part in model.named_modules()}
    callers = (id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__))
    passed = [names[caller] for caller in callers if caller in names]
    return (passed[-1] if passed else "") or type(model).__name__
