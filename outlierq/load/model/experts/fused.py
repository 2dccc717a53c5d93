"""Mixtures of experts: the model class keeps all experts of a block in a few tensors, here each is a module of its own.

The skeleton is given the experts as they are presented, one linear layer per tensor (`apart.py` presents fused
tensors so), so that everything that knows linear layers (discovery, statistics, folds, quantization, export under the
names on disk) knows experts, too. What a fused module computes is not guessed: it must declare itself
(`layout.py`), or is tried (`proof.py`). `calibrate/experts.py` says which tokens they see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from outlierq.core.model import EXPERT_COUNTS
from outlierq.load.model.experts.finding import fused_modules
from outlierq.load.model.experts.layout import Layout, Leaves, merged_leaves, usual_leaves
from outlierq.load.model.experts.separate import Expert, SeparateExperts
from outlierq.load.model.names import stored_names

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


def separate_experts(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Replace fused experts of the model by separate ones wherever the checkpoint has them so. Changes the model."""
    if checkpoint.kind == "gguf":
        return  # these files keep experts together
    layouts = fused_modules(model)
    if not layouts:
        return
    held = stored_names([name for name, info in checkpoint.tensors.items() if len(info.shape) == 3], model)
    tables: dict[tuple[str, Layout], Leaves | None] = {}
    for name, layout in layouts.items():
        short, part = name.rpartition(".")[2], model.get_submodule(name)
        kind = re.sub(r"\d+", "", name)  # the same in every block
        if (kind, layout) not in tables:
            tables[kind, layout] = merged_leaves(model, name, layout)
        merged = tables[kind, layout]
        leaves = merged or usual_leaves(layout)
        if f"{name}.{layout.up}" not in held and _is_apart(checkpoint, short, leaves):
            ways = {"is_merged": merged is not None, "is_replaced": _is_replaced(part)}
            model.set_submodule(name, SeparateExperts(part, layout, leaves, **ways))


def _is_replaced(part: torch.nn.Module) -> bool:
    """Whether transformers replaces the module by one of separate experts when it loads a compressed checkpoint."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    return type(part).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION


def unmerged_experts(model: torch.nn.Module) -> list[str]:
    """Modules of separate experts that transformers cannot load from separate experts: it knows their class fused."""
    return [name for name, part in model.named_modules() if isinstance(part, SeparateExperts) and not part.is_merged]


def replaced_experts(model: torch.nn.Module) -> list[str]:
    """Modules of separate experts that transformers has apart in compressed checkpoints, and loads in no other way."""
    return [name for name, part in model.named_modules() if isinstance(part, SeparateExperts) and part.is_replaced]


def _is_apart(checkpoint: Checkpoint, name: str, leaves: Leaves) -> bool:
    """Whether the checkpoint has a tensor of the first expert alone."""
    return any(tensor.endswith(f"{name}.0.{leaves.up}.weight") for tensor in checkpoint.tensors)


def expert_names(model: torch.nn.Module) -> list[str]:
    """Names of all separate experts within a module."""
    return [name for name, part in model.named_modules() if isinstance(part, Expert)]


def router_names(model: torch.nn.Module) -> set[str]:
    """Names of the parts that say which experts see a token, or how much of a shared one is wanted.

    Beside experts, together or apart: what has a row for each of them, or a single one, itself or as the last matrix of
    a part that holds no expert. All linears of such a part decide with it.
    """
    return set(_routers(model))


def _routers(model: torch.nn.Module) -> Iterator[str]:
    """The routers beside every mixture."""
    for name, part in model.named_modules():
        counts = {count for child in part.children() if (count := _experts_in(child))}
        for child_name, child in part.named_children() if counts else ():
            if not _experts_in(child):
                inside = f"{name}.{child_name}".removeprefix(".")
                yield from (f"{inside}.{each}".removesuffix(".") for each in _deciding(child, counts))


def _experts_in(part: torch.nn.Module) -> int:
    """The number of experts that a module holds, 0 when it is no mixture."""
    if isinstance(part, SeparateExperts):
        return part.num_experts
    stacks = [p for p in part._parameters.values() if p is not None and p.dim() == 3]
    number = next((getattr(part, key) for key in EXPERT_COUNTS if isinstance(getattr(part, key, None), int)), 0)
    return number if any(len(stack) == number for stack in stacks) else 0


def _deciding(child: torch.nn.Module, counts: set[int]) -> list[str]:
    """Names, within a part beside experts, of the matrices by which it chooses among them; none for another part."""
    matrices = {
        name: part._parameters["weight"]
        for name, part in child.named_modules()
        if part._parameters.get("weight") is not None and part._parameters["weight"].dim() == 2
    }
    if not matrices:
        return []
    width, rows = next(iter(matrices.values())).shape[1], list(matrices.values())[-1].shape[0]
    # A few more rows than experts: for none of them, or for shared ones. What gives back what it got is a layer.
    chooses = rows in counts or (rows != width and any(count < rows < 2 * count for count in counts))
    return list(matrices) if chooses or ("" in matrices and rows == 1) else []
