"""Names: which stored tensor is which parameter of the skeleton.

Files and model classes disagree about names in three ways: with or without the base-model prefix ("transformer.h.0" or
"h.0"), names that transformers changed since the file was written, and shared tensors stored once. The first two are
answered by transformers' own conversion tables, the third by its table of tied weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.load.model.other_tools import lack_hint

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

SHOWN = 5


def checkpoint_names(checkpoint: Checkpoint, skeleton: torch.nn.Module) -> dict[str, str]:
    """Name of the stored tensor for every parameter of the skeleton, and for each of its buffers that is stored.

    In the order of definition, tied parameters last; each maps to the tensor that it shares. SourceError names
    parameters that the checkpoint lacks, and tensors of another shape than the model's.
    """
    slots = _slots(skeleton)
    names = _stored_names(checkpoint.tensors, skeleton, slots)
    for target, source in tied_parameters(checkpoint, skeleton, names).items():
        names.pop(target, None)  # of two slots of one tensor, the owner comes first
        names[target] = names[source]
    _check_complete(checkpoint, skeleton, names)
    _check_shapes(checkpoint, slots, names)
    return names


def tied_parameters(checkpoint: Checkpoint, skeleton: torch.nn.Module, names: dict[str, str]) -> dict[str, str]:
    """Parameter -> parameter whose stored tensor it shares.

    Pairs are those of the model class. Stored once: shared, unless the config says `tie_word_embeddings: false`. Stored
    twice: shared when the config says so and the values are equal (both are read for that); a file whose values differ
    is believed, not the config.
    """
    said = shared_parameters(skeleton)
    tied: dict[str, str] = {}
    for target, source in _possible_ties(checkpoint, skeleton).items():
        if source in names and target in names:
            if target in said and _equal(checkpoint, names[target], names[source]):
                tied[target] = source
        elif source in names:
            tied[target] = source
        elif target in names:
            tied[source] = target
    return tied


def shared_parameters(skeleton: torch.nn.Module) -> dict[str, str]:
    """Parameter -> parameter whose weight it shares, by transformers' table and the config.

    SourceError where the table does not fit what is stored: experts apart that the class shares as one tensor.
    """
    try:
        pairs: dict[str, str] = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    except ValueError as error:
        raise SourceError(
            f"{type(skeleton).__name__} shares the experts of several parts as whole tensors, and the checkpoint has "
            "each apart: which share a weight is not known",
            hint="such models are not supported",
        ) from error
    return pairs


def _possible_ties(checkpoint: Checkpoint, skeleton: torch.nn.Module) -> dict[str, str]:
    """Pairs (parameter, parameter it shares) of the model class; none when the config says that none are tied."""
    if any("tie_word_embeddings" in place for place in _configs(checkpoint.config)):
        return shared_parameters(skeleton)
    said = skeleton.config.__dict__.get("tie_word_embeddings")
    skeleton.config.tie_word_embeddings = True
    try:
        return shared_parameters(skeleton)
    finally:
        if said is None:  # some classes know no such key
            del skeleton.config.tie_word_embeddings
        else:
            skeleton.config.tie_word_embeddings = said


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors hold the same values; headers are asked first."""
    import torch

    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(checkpoint.read(one), checkpoint.read(other))


def _configs(config: dict) -> list[dict]:
    """The config and the configs nested in it."""
    return [config, *(value for value in config.values() if isinstance(value, dict))]


def _slots(skeleton: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything a file may fill: parameters (tied ones under each of their names) and persistent buffers."""
    return skeleton.state_dict(keep_vars=True)


def _stored_names(
    tensors: Collection[str], skeleton: torch.nn.Module, slots: dict[str, torch.Tensor]
) -> dict[str, str]:
    """Slot name -> tensor name, for every stored tensor that has a slot. An exact name wins over a renamed one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [step for step in get_model_conversion_mapping(skeleton) if isinstance(step, WeightRenaming)]
    prefix = skeleton.base_model_prefix or None
    names: dict[str, str] = {name: name for name in tensors if name in slots}
    for tensor in tensors:
        if tensor not in names:
            slot, _ = rename_source_key(tensor, renamings, [], prefix, slots)
            if slot in slots:
                names.setdefault(slot, tensor)
    return {slot: names[slot] for slot in slots if slot in names}


def stored_names(tensors: Collection[str], skeleton: torch.nn.Module) -> dict[str, str]:
    """Name of the stored tensor of every parameter of a class that has one, without ties; what is lost is not said.

    tensors: names of those to look at.
    """
    return _stored_names(tensors, skeleton, _slots(skeleton))


def made_names(tensors: Collection[str], skeleton: torch.nn.Module) -> dict[str, str]:
    """Name of a stored tensor of every parameter that transformers makes of others as it loads them: of the first."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(skeleton)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    slots = _slots(skeleton)
    names: dict[str, str] = {}
    for tensor in tensors:
        slot, pattern = rename_source_key(tensor, renamings, converters, skeleton.base_model_prefix or None, slots)
        step = next((step for step in converters if pattern in step.source_patterns), None)
        for target in step.target_patterns if step else ():
            other = slot.replace(step.target_patterns[0], target, 1)
            if other in slots:
                names.setdefault(other, tensor)
    return names


def _check_complete(checkpoint: Checkpoint, skeleton: torch.nn.Module, names: dict[str, str]) -> None:
    """Every parameter must have a tensor."""
    lost = [name for name, _ in skeleton.named_parameters(remove_duplicate=False) if name not in names]
    if lost:
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise SourceError(
            f"{checkpoint.source} lacks {len(lost)} parameters of {type(skeleton).__name__}: "
            f"{', '.join(lost[:SHOWN])}{more}",
            hint=lack_hint(checkpoint, lost),
        )


def _check_shapes(checkpoint: Checkpoint, slots: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Every stored tensor must have the shape of its slot."""
    for slot, tensor in names.items():
        stored, needed = checkpoint.tensors[tensor].shape, tuple(slots[slot].shape)
        if stored != needed:
            raise SourceError(
                f"tensor {tensor} is {list(stored)}, but the model built from config.json needs {list(needed)}",
                hint="the weights do not belong to this config.json",
            )
