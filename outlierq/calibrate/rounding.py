"""A block whose linears round their inputs as the client will, while statistics are made of what they then see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.trace import first_input, submodule

if TYPE_CHECKING:
    import torch

    from outlierq.core.scheme import ActivationScheme

    Hook = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@contextmanager
def rounding_inputs(module: torch.nn.Module, schemes: Mapping[str, ActivationScheme]) -> Iterator[None]:
    """Inside, the named linears of a block round their inputs. Two-level scales have the unit of the batch.

    A `Collector` entered inside still sees them as they come. schemes: by full module name.
    """
    rounder = _Rounder()
    handles = [
        submodule(module, name).register_forward_pre_hook(rounder.hook(scheme), with_kwargs=True)
        for name, scheme in schemes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rounder:
    """Rounds an input that several linears read once."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, ActivationScheme, torch.Tensor] | None = None

    def hook(self, scheme: ActivationScheme) -> Hook:
        """A forward pre-hook."""

        def rounded(
            part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = self._rounded(first_input(args, kwargs), scheme)
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): x}

        return rounded

    def _rounded(self, x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
        from outlierq.ops.activations import fake_quantize

        if self._last is None or self._last[0] is not x or self._last[1] != scheme:
            self._last = x, scheme, fake_quantize(x, scheme)
        return self._last[2]
