"""Whether every stored tensor has the place in the model that config.json says: `verify` and `quantize` both ask."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.load.model.decoder import block_list
from outlierq.load.model.names import shared_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from outlierq.core.model import Checkpoint, StudiedModel


@dataclass(frozen=True)
class Misplaced:
    """A stored tensor that is not where config.json says. check: "tensors" or "tied weights". what: how.

    is_other_model: what config.json describes and what is stored are two models; a copy of it would be wrong, too.
    """

    check: str
    tensor: str
    what: str
    is_other_model: bool = False


def misplaced(checkpoint: Checkpoint, skeleton: torch.nn.Module, names: Mapping[str, str]) -> list[Misplaced]:
    """Every such tensor. names: of `checkpoint_names`."""
    shared = shared_parameters(skeleton)
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or []
    known, (announced, beyond) = set(names.values()), _blocks_beyond(skeleton)
    found = []
    for name in checkpoint.tensors:
        if name in shared and names.get(name, name) != name:
            said = f"is stored, though config.json says that it shares {names[name]}"
            found.append(Misplaced("tied weights", name, said))
        elif name not in known and not any(re.search(pattern, name) for pattern in [*ignored, announced]):
            said = "belongs to no parameter of the model and to no quantized weight"
            found.append(Misplaced("tensors", name, said, bool(beyond.match(name))))
    for target, owner in shared.items():
        if names.get(target) == target and names.get(owner) == owner:
            said = f"config.json says that it shares {owner}, but it holds other values"
            found.append(Misplaced("tied weights", target, said, True))
    return found


def refuse_other_model(model: StudiedModel) -> None:
    """SourceError when config.json describes another model than the one whose weights are stored."""
    if model.checkpoint.studied() is not None:
        return  # it has no other description
    found = [each for each in misplaced(model.checkpoint, model.skeleton, model.names) if each.is_other_model]
    if not found:
        return
    more = f" ({len(found)} such tensors)" if found[1:] else ""
    tied = found[0].check == "tied weights"
    raise SourceError(
        f"config.json and the weights of {model.checkpoint.source} disagree: {found[0].tensor} {found[0].what}{more}",
        hint="set tie_word_embeddings to false in config.json when the stored head is meant, or remove that tensor"
        if tied
        else "correct the number of layers in config.json, or remove these tensors",
    )


def _blocks_beyond(skeleton: torch.nn.Module) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Two that fit names of tensors in blocks behind those that the model has: in the extra ones that its config
    announces, and in others.
    """
    name, blocks = block_list(skeleton)
    extra = getattr(skeleton.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    bare = name.removeprefix(f"{skeleton.base_model_prefix}.")
    before = rf"^(?:{re.escape(name)}|{re.escape(bare)})\."
    numbers = [str(number) for number in range(len(blocks) + extra)]
    announced = "|".join(numbers[len(blocks) :]) or "(?!)"
    return re.compile(rf"{before}(?:{announced})\."), re.compile(rf"{before}(?!(?:{'|'.join(numbers)})\.)\d+\.")
