"""Building a model class without weights, and without the memory that a hostile config would have it fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch.overrides import TorchFunctionMode

from outlierq.core.errors import SourceError

T = TypeVar("T")
# What a class may fill with numbers while it is built (masks, tables of angles), all its tables together. Weights are
# not filled: `torch.empty` and `torch.zeros` take no memory until somebody writes.
MOST_TABLE_BYTES = 4 << 30
FILLING = (torch.ones, torch.full, torch.arange, torch.eye, torch.linspace, torch.logspace, torch.rand, torch.randn)
# What classes call to initialise weights. On the meta device it changes nothing, and took a fifth of the
# time that a plan takes.
INITIALISING = frozenset(
    (
        *("normal_", "uniform_", "trunc_normal_", "zeros_", "ones_", "constant_", "zero_", "fill_"),
        *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
    )
)
LARGE = 1 << 20  # elements of an input whose results are looked at before they are made


class _Bounded(TorchFunctionMode):
    """Refuses to make tables that are larger together than MOST_TABLE_BYTES, before they are made, and initialises no
    weight that has no memory.
    """

    def __init__(self, source: str):
        super().__init__()
        self.source, self.filled = source, 0

    def __torch_function__(
        self, func: Callable[..., T], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> T:
        kwargs = kwargs or {}
        weight = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in INITIALISING and isinstance(weight, torch.Tensor) and weight.is_meta:
            return cast("T", weight)
        size = _size(func, args, kwargs)
        self.filled += size
        if self.filled > MOST_TABLE_BYTES:
            raise SourceError(
                f"config.json of {self.source} asks for tables of {self.filled:,} bytes before any weight is read "
                f"(the last one of {size:,}); the most is {MOST_TABLE_BYTES:,}",
                hint="look at the numbers of positions and channels in config.json",
            )
        return func(*args, **kwargs)


def _size(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes of what a torch function would make of nothing, or of something large; 0 for all else, such as a weight
    that goes to the meta device.
    """
    if any(str(value) == "meta" for value in (*args, *kwargs.values()) if isinstance(value, str | torch.device)):
        return 0
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if func in FILLING:
        made = func(*args, **{**kwargs, "device": "meta"})
    elif func is torch.Tensor.to and any(str(value) == "meta" for value in (*args[1:], *kwargs.values())):
        return 0  # a parameter that gives up its memory
    elif any(tensor.numel() >= LARGE and tensor.device.type != "meta" for tensor in tensors):
        try:
            made = func(*map(_to_meta, args), **{key: _to_meta(value) for key, value in kwargs.items()})
        except (RuntimeError, TypeError, ValueError, NotImplementedError):  # not known without values
            return 0
    else:
        return 0
    return made.nbytes if isinstance(made, torch.Tensor) and made._base is None else 0


def _to_meta(value: T) -> T | torch.Tensor:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


@contextmanager
def building(source: str) -> Iterator[None]:
    """Inside, modules get their parameters on the meta device; buffers are real. SourceError when they are too large.

    source: what the config is of, for the message.
    """
    from accelerate import init_empty_weights

    with _Bounded(source), init_empty_weights(include_buffers=False):
        yield
