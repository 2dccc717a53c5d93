"""Parameters that transformers joins of several stored tensors: the skeleton is given the tensors as they are stored.

Some classes hold in one convolution or table what files keep apart (the convolutions of queries, keys and values in
Kimi-Linear). Such an owner gets a part for each stored tensor, and its weight is joined of them when it is asked for.
So everything that knows stored tensors works as ever, and what is written has the names that were read. Which tensors
are joined, and along which axis, is told by transformers' own conversion table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint


@dataclass
class _Joined:
    """The pieces of one parameter: the axis along which they are joined, and where each is (place, name, shape)."""

    dim: int
    pieces: list[tuple[tuple[int, list[int]], str, tuple[int, ...]]] = field(default_factory=list)


def separate_pieces(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Give the owner of every joined parameter its pieces, where the checkpoint stores them so. Changes the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    joining = [step for step in steps if isinstance(step, WeightConverter) and _joins(step)]
    if not joining:
        return
    slots = model.state_dict(keep_vars=True)
    found: dict[str, _Joined] = {}
    for tensor, info in checkpoint.tensors.items():
        place = _place(tensor, renamings, joining, model.base_model_prefix or None, slots)
        if place is not None:
            slot, step, order, piece = place
            joined = found.setdefault(slot, _Joined(step.operations[0].dim))
            joined.pieces.append((order, piece, tuple(info.shape)))
    for slot, joined in found.items():
        if not isinstance(model.get_submodule(slot.rpartition(".")[0]), torch.nn.Linear):
            _separate(model, slot, joined, slots[slot].dtype)


def _joins(step: Any) -> bool:
    """Whether a conversion joins tensors and does nothing else."""
    return [type(operation).__name__ for operation in step.operations] == ["Concatenate"]


def _place(
    tensor: str, renamings: list[Any], joining: list[Any], prefix: str | None, slots: dict[str, torch.Tensor]
) -> tuple[str, Any, tuple[int, list[int]], str] | None:
    """The parameter that a stored tensor is a piece of, by which step, its order there, and its name as a part."""
    from transformers.core_model_loading import rename_source_key

    slot, pattern = rename_source_key(tensor, renamings, joining, prefix, slots)
    if pattern is None or slot not in slots or tensor in slots:
        return None
    step = next(step for step in joining if pattern in step.source_patterns)
    own, _ = rename_source_key(tensor, renamings, [])
    target, _ = rename_source_key(tensor, renamings, joining)
    piece = slot.removesuffix(target) + own if slot.endswith(target) else own.removeprefix(target.removesuffix(slot))
    numbers = [int(number) for number in re.findall(r"\d+", own)]
    return slot, step, (step.source_patterns.index(pattern), numbers), piece


def _separate(model: torch.nn.Module, slot: str, joined: _Joined, dtype: torch.dtype) -> None:
    """Put the pieces of one parameter into the model, and a property in its place."""
    owner_name, _, leaf = slot.rpartition(".")
    owner = model.get_submodule(owner_name)
    parts = []
    for _, piece, shape in sorted(joined.pieces):
        part_name, _, name = piece.rpartition(".")
        part = torch.nn.Module()
        part.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
        model.set_submodule(part_name, part)
        parts.append((part, name))
    del owner._parameters[leaf]

    def join(_: torch.nn.Module) -> torch.Tensor:
        return torch.cat([part._parameters[name] for part, name in parts], joined.dim)

    owner.__class__ = type(type(owner).__name__, (type(owner),), {leaf: property(join)})
