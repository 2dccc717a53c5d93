"""A forward of a model: faults inside its own code in one sentence with the name of the module, and its early end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError, SourceError, lacks_memory
from outlierq.core.machine.untrusted import brief

if TYPE_CHECKING:
    import torch

FAULTS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError)


class StopForward(Exception):
    """Raised where the rest of a forward is not needed."""


def head_of(model: Any) -> torch.nn.Module | None:
    """The output head; None for a model without one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


@contextmanager
def stopping_at_head(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `StopForward` ends a forward where the output head would begin; a model without one runs as it is."""
    head = head_of(model)

    def stop(*_: Any) -> None:
        raise StopForward

    handle = None if head is None else head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle:
            handle.remove()


def several_rounds(model: torch.nn.Module, block: str, count: int) -> SourceError:
    """What is wrong with a model for calibration that runs a block `count` times in a forward."""
    return SourceError(
        f"{type(model).__name__} runs its block {block} more than once ({count} times) for each token; calibration "
        "would see the first round only",
        hint="use a recipe that needs no calibration, such as rtn-w4 or rtn-w8",
    )


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
