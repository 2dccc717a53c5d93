"""A model whose linears round their inputs behind turns that change nothing else: what rotations learn against.

    x -> (Q(x R / s) s) R^T     readers of the stream; for values, x -> (Q((x / s) R) R^T) s

The weights stay as they are: turned and rounded inputs are turned back in front of them, so that a gradient by R and s
needs no gradient by weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.trace import first_input

if TYPE_CHECKING:
    import torch

    from outlierq.core.scheme import ActivationScheme

Turns = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class TurnedInput:
    """How the input of a linear is turned and rounded. scheme: None where it is not rounded.

    rotation, scale: names of turns, None where there is none. parts: the matrix [d, d] for each run of d channels.
    places: of every channel, its place in the scale. scale_first: before the rotation.
    """

    scheme: ActivationScheme | None
    rotation: str | None = None
    scale: str | None = None
    parts: tuple[int, ...] = (0,)
    places: tuple[int, ...] | None = None
    scale_first: bool = False

    def turned(self, x: torch.Tensor, turns: Turns) -> torch.Tensor:
        """x [..., K] as a rounding sees it."""
        first, last = self._steps(turns)
        return last(first(x, False), False)

    def back(self, x: torch.Tensor, turns: Turns) -> torch.Tensor:
        """The same undone, [..., K]."""
        first, last = self._steps(turns)
        return first(last(x, True), True)

    def _steps(self, turns: Turns) -> tuple[Step, Step]:
        """What is done first, and then, each of (x, whether it is undone)."""

        def scaled(x: torch.Tensor, undone: bool) -> torch.Tensor:
            if self.scale is None or self.scale not in turns:
                return x
            scale = turns[self.scale].to(x)
            scale = scale if self.places is None else scale[list(self.places)]
            return x * scale if undone else x / scale

        def rotated(x: torch.Tensor, undone: bool) -> torch.Tensor:
            import torch

            if self.rotation is None or self.rotation not in turns:
                return x
            matrices = turns[self.rotation].to(x)
            matrices = matrices.mT if undone else matrices
            if len(self.parts) == 1:
                return x @ matrices[self.parts[0]]
            runs = x.unflatten(-1, (len(self.parts), -1))
            return torch.einsum("...pd,pde->...pe", runs, matrices[list(self.parts)]).flatten(-2)

        return (scaled, rotated) if self.scale_first else (rotated, scaled)


Step = Callable[["torch.Tensor", bool], "torch.Tensor"]


class Turning:
    """Hooks on linears of a model, by module name. turns: what they turn by, float32; set it before the model runs.

    moments: where a dict is given, inputs are not rounded; sums of x x^T over all tokens [parts, d, d] are added to it
    by rotation, of what it sees without any turn.
    """

    def __init__(self, model: torch.nn.Module, inputs: Mapping[str, TurnedInput]):
        self.turns: Turns = {}
        self.moments: dict[str, torch.Tensor] | None = None
        self._last: tuple[torch.Tensor, TurnedInput, torch.Tensor] | None = None
        for name, each in inputs.items():
            model.get_submodule(name).register_forward_pre_hook(self._hook(each), with_kwargs=True)

    def _hook(self, how: TurnedInput) -> Callable[..., Any]:
        """A forward pre-hook."""

        def replaced(
            part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = self._seen(first_input(args, kwargs), how)
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): x}

        return replaced

    def _seen(self, x: torch.Tensor, how: TurnedInput) -> torch.Tensor:
        """What the linear gets instead of x [..., K]; of linears that read one tensor, made once."""
        if self._last is None or self._last[0] is not x or self._last[1] != how:
            self._last = x, how, self._made(x, how)
        return self._last[2]

    def _made(self, x: torch.Tensor, how: TurnedInput) -> torch.Tensor:
        from outlierq.ops.activations import rounded_by_its_scale

        if self.moments is not None:
            self._add(x, how, self.moments)
            return x
        if how.scheme is None:
            return x
        rounded = rounded_by_its_scale(how.turned(x.float(), self.turns), how.scheme)
        return how.back(rounded, self.turns).to(x.dtype)

    def _add(self, x: torch.Tensor, how: TurnedInput, moments: dict[str, torch.Tensor]) -> None:
        """Add what a rotation sees of x [..., K]."""
        import torch

        if how.rotation is None:
            return
        runs = x.detach().double().reshape(-1, len(how.parts), x.shape[-1] // len(how.parts))
        products = torch.einsum("tpd,tpe->pde", runs, runs)
        total = products.new_zeros(max(how.parts) + 1, *products.shape[1:])
        total.index_add_(0, torch.tensor(how.parts, device=x.device), products)
        moments[how.rotation] = moments.get(how.rotation, 0) + total
