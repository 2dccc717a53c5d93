"""What a fused module of experts computes when its class does not declare it: tried on random weights, not guessed.

Every layout that fits the shapes is tried: the module with separate experts must give the output of the class itself.
The random weights are windows into one short row of numbers, so that a module of any size costs no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

from outlierq.load.model.experts.layout import DOWN, GATE_UP, Layout, Leaves, rows_of
from outlierq.load.model.experts.separate import SeparateExperts

if TYPE_CHECKING:
    import torch

USUAL = Leaves("gate_proj", "up_proj", "down_proj")
TOKENS, CHOSEN = 5, 2
# Steps in the row of numbers from expert to expert, row to row, column to column.
STRIDES = (31, 7, 1)
# Largest relative difference in float32.
SAME = 1e-4


def proved_layout(part: torch.nn.Module) -> Layout | None:
    """The layout in which separate experts compute what the module computes; None when none does."""
    own = {name: parameter for name, parameter in part._parameters.items() if parameter is not None}
    if own.keys() != {GATE_UP, DOWN} or any(parameter.dim() != 3 for parameter in own.values()):
        return None
    shapes = tuple(own[GATE_UP].shape), tuple(own[DOWN].shape)
    return next((layout for layout in _fitting(*shapes) if _computes_the_same(part, layout)), None)


@cache
def _fitting(up: tuple[int, ...], down: tuple[int, ...]) -> list[Layout]:
    """Every layout that fits the shapes of both tensors."""
    fitting = []
    if up[0] == down[0] and (up[1], up[2]) == (2 * down[2], down[1]):
        fitting += [Layout(is_concatenated=way) for way in (True, False)]
    if up[0] == down[0] and (up[2], up[1]) == (2 * down[1], down[2]):
        fitting += [Layout(is_transposed=True, is_concatenated=way) for way in (True, False)]
    return [Layout(**{**vars(layout), "is_sorted": way}) for way in (False, True) for layout in fitting]


def _computes_the_same(part: torch.nn.Module, layout: Layout) -> bool:
    """Whether the class with random weights, and separate experts with the same, give one output."""
    import torch

    fused = copy.deepcopy(part)
    shapes = {name: fused._parameters[name].shape for name in (GATE_UP, DOWN)}
    count, _, hidden = layout.widths(fused)
    weights = {name: _windows(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    separate = SeparateExperts(copy.deepcopy(fused), layout, USUAL, is_merged=False)
    for number in range(count):
        for slot, leaf, which in layout.pieces(USUAL):
            matrix = weights[slot][number].T if layout.is_transposed else weights[slot][number]
            linear = separate.get_submodule(f"{number}.{leaf.removesuffix('.weight')}")
            linear.weight = torch.nn.Parameter(matrix[rows_of(which, len(matrix))], requires_grad=False)
    for name, weight in weights.items():
        fused._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
    arguments = _arguments(layout, count, hidden)
    try:
        with torch.no_grad():
            expected, output = fused(*arguments), separate(*arguments)
    except (TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        return False  # the class takes other arguments, or other shapes
    if not isinstance(expected, torch.Tensor) or expected.shape != output.shape:
        return False
    return bool((expected - output).norm() <= SAME * expected.norm()) and bool(expected.any())


def _arguments(layout: Layout, count: int, hidden: int) -> Iterator[torch.Tensor]:
    """What a module of experts is called with."""
    import torch

    random = torch.Generator().manual_seed(0)
    if layout.is_sorted:
        return (torch.randn(TOKENS * count, hidden, generator=random),)
    chosen = torch.stack([torch.randperm(count, generator=random)[:CHOSEN] for _ in range(TOKENS)])
    return torch.randn(TOKENS, hidden, generator=random), chosen, torch.rand(chosen.shape, generator=random)


def _windows(shape: torch.Size, seed: int) -> torch.Tensor:
    """Random weights of a shape that overlap in memory, of the size that keeps what goes through them."""
    import torch

    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, STRIDES, strict=True))
    numbers = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * min(shape[1:]) ** -0.5
    return numbers.as_strided(tuple(shape), STRIDES)
