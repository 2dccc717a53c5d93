"""Parameters that transformers makes of other tensors as it loads them: the skeleton is given the tensors as stored.

Some classes hold in one convolution, table or linear what files keep apart (the convolutions of queries, keys and
values in Kimi-Linear), or apart what files keep together (queries, keys and values of many vision towers), or in
another order. Such an owner gets a part for each stored tensor, and its weight is made of them when it is asked for; a
linear that is joined of linears runs them and joins what they give. So everything that knows stored tensors works as
ever, and what is written has the names that were read. What is made of what, and how, is told by transformers' own
conversion table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.model import MADE_OF

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

Slots = Mapping[str, torch.Tensor]
Values = Mapping[str, Any]
Parts = dict[str, torch.nn.Module]  # name of a piece -> the module that holds it
WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """A stored tensor. order: among those of the same pattern. name: of its part in the model."""

    tensor: str
    pattern: str
    order: list[int]
    name: str
    shape: tuple[int, ...]


@dataclass
class Made:
    """What one conversion makes of some stored tensors. slot: the first parameter that it makes."""

    step: Any
    slot: str
    pieces: list[Piece] = field(default_factory=list)

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Those of the parameters by name, tried without values."""
        nothing = {piece.name: torch.empty(piece.shape, device="meta") for piece in self.pieces}
        return {name: tuple(value.shape) for name, value in self.of(nothing, sizes).items()}

    def of(self, values: Values, sizes: Sizes) -> Values:
        """The parameters by name. values: the stored tensors, by the names of their pieces."""
        tensors: dict[str, Any] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.order):
            tensors.setdefault(piece.pattern, []).append(values[piece.name])
        for operation in self.step.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=self.step.source_patterns,
                target_patterns=self.step.target_patterns,
                full_layer_name=self.slot,
                model=sizes,
                config=sizes.config,
                missing_keys=None,
            )
        before, _, after = next(self.slot.partition(key) for key in tensors if key in self.slot)
        return {before + key + after: value for key, value in tensors.items()}


@dataclass(frozen=True)
class Sizes:
    """What transformers' conversions ask of a model."""

    slots: Slots
    config: Any

    def get_parameter(self, name: str) -> torch.Tensor:
        """The parameter of the untouched model, for its shape."""
        return self.slots[name]


def separate_pieces(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Give the owners of all parameters that are made of stored tensors these as parts. Changes the model."""
    conversions, sizes = conversions_of(model, checkpoint)
    for made in conversions:
        _separate(model, made, sizes)


def conversions_of(model: torch.nn.Module, checkpoint: Checkpoint) -> tuple[list[Made], Sizes]:
    """Every conversion that makes parameters of the model of stored tensors, and what it asks of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    slots = model.state_dict(keep_vars=True) if converters else {}
    sizes = Sizes(slots, model.config)
    conversions: dict[str, Made] = {}
    for tensor, info in checkpoint.tensors.items() if converters else ():
        place = _place(tensor, renamings, converters, model.base_model_prefix or None, slots)
        if place is not None:
            slot, step, pattern, name = place
            order = [int(number) for number in re.findall(r"\d+", name)]
            piece = Piece(tensor, pattern, order, name, tuple(info.shape))
            conversions.setdefault(slot, Made(step, slot)).pieces.append(piece)
    return [made for made in conversions.values() if _fits(made, sizes)], sizes


def _place(
    tensor: str, renamings: list[Any], converters: list[Any], prefix: str | None, slots: Slots
) -> tuple[str, Any, str, str] | None:
    """The first parameter that a stored tensor is a piece of, by which step and pattern, and its name as a part."""
    from transformers.core_model_loading import rename_source_key

    slot, pattern = rename_source_key(tensor, renamings, converters, prefix, slots)
    if pattern is None or slot not in slots or tensor in slots:
        return None
    step = next(step for step in converters if pattern in step.source_patterns)
    own, _ = rename_source_key(tensor, renamings, [])
    target, _ = rename_source_key(tensor, renamings, converters)
    name = slot.removesuffix(target) + own if slot.endswith(target) else own.removeprefix(target.removesuffix(slot))
    return None if name in slots else (slot, step, pattern, name)


def _fits(made: Made, sizes: Sizes) -> bool:
    """Whether the stored tensors make parameters that the model has, each in its shape: tried without values."""
    try:
        shapes = made.shapes(sizes)
    except (ValueError, RuntimeError, LookupError, AttributeError, TypeError, StopIteration):
        return False  # whoever wants the parameters says that they are not there
    return all(name in sizes.slots and shape == sizes.slots[name].shape for name, shape in shapes.items())


def _separate(model: torch.nn.Module, made: Made, sizes: Sizes) -> None:
    """Put the pieces into the model, and a property in the place of each parameter."""
    joined = _joined_linear(model, made)
    dtype = sizes.slots[made.slot].dtype
    parts = {piece.name: _part(model, piece, dtype, is_linear=joined is not None) for piece in made.pieces}
    for name in made.shapes(sizes):
        owner, _, leaf = name.rpartition(".")
        _replace(model.get_submodule(owner), leaf, parts, partial(_value, made, sizes, name))
    if joined is not None:
        joined.__class__ = type(type(joined).__name__, (type(joined),), {"forward": _run_pieces})


def _value(made: Made, sizes: Sizes, name: str, parts: Parts) -> torch.Tensor:
    """A parameter as the pieces make it that are there now."""
    value: torch.Tensor = made.of({piece: part._parameters[_leaf(piece)] for piece, part in parts.items()}, sizes)[name]
    return value


def _run_pieces(joined: Any, x: torch.Tensor) -> torch.Tensor:
    """What a linear gives that is joined of linears: what each of them gives, [..., rows of all]."""
    return torch.cat([part(x) for part in joined.__dict__[MADE_OF][WEIGHT].values()], -1)


def _joined_linear(model: torch.nn.Module, made: Made) -> torch.nn.Linear | None:
    """The linear layer whose rows are those of the pieces, one after the other; None for all other parameters."""
    owner_name, _, leaf = made.slot.rpartition(".")
    owner = model.get_submodule(owner_name)
    is_joined = [type(operation).__name__ for operation in made.step.operations] == ["Concatenate"]
    is_linear = type(owner) is torch.nn.Linear and owner.bias is None and leaf == WEIGHT
    return owner if is_joined and is_linear and made.step.operations[0].dim == 0 else None


def _part(model: torch.nn.Module, piece: Piece, dtype: torch.dtype, *, is_linear: bool) -> torch.nn.Module:
    """The module that holds a piece, which is made where there is none."""
    name, _, leaf = piece.name.rpartition(".")
    owner = _module(model, name, torch.nn.Linear(*reversed(piece.shape), False, "meta") if is_linear else None)
    owner.register_parameter(leaf, torch.nn.Parameter(torch.empty(piece.shape, dtype=dtype, device="meta")))
    return owner


def _module(model: torch.nn.Module, name: str, new: torch.nn.Module | None) -> torch.nn.Module:
    """The module of a name; one that there is not is `new`, or an empty one, as are those on the way to it."""
    owner, _, leaf = name.rpartition(".")
    parent = _module(model, owner, None) if owner else model
    if not hasattr(parent, leaf):
        parent.add_module(leaf, torch.nn.Module() if new is None else new)
    return parent.get_submodule(leaf)


def _replace(owner: torch.nn.Module, leaf: str, parts: Parts, value: Callable[[Parts], torch.Tensor]) -> None:
    """Put a property in the place of a parameter. parts: kept by the owner, so that a copy asks the copies of them."""
    del owner._parameters[leaf]
    owner.__dict__.setdefault(MADE_OF, {})[leaf] = parts
    made = property(lambda part: value(part.__dict__[MADE_OF][leaf]))
    owner.__class__ = type(type(owner).__name__, (type(owner),), {leaf: made})


def _leaf(name: str) -> str:
    """The last part of a name."""
    return name.rpartition(".")[2]
