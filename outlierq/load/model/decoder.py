"""The text decoder inside a model, the list of its blocks, and the towers for images and audio beside it.

Found by structure: transformers says which part of a model its text runs through, and the blocks are the largest list
in that part, however large a tower is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError
from outlierq.core.model import largest
from outlierq.recipe.patterns import tower_of

if TYPE_CHECKING:
    import torch


def block_list(skeleton: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """Name and members of the module list that holds most parameters of the text decoder.

    Of those that are in no other list; where one of them is as long as the config says that there are blocks, it counts
    no other: some decoders hold a tower with larger ones.
    """
    lists = _outermost_lists(skeleton, text_decoder(skeleton))
    if not lists:
        raise SourceError(f"{type(skeleton).__name__} has no list of decoder blocks")
    count = largest(skeleton.config.get_text_config(), "num_hidden_layers")
    lists = [(name, part) for name, part in lists if len(part) == count] or lists
    return max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def _outermost_lists(skeleton: torch.nn.Module, root: str) -> list[tuple[str, torch.nn.ModuleList]]:
    """Every module list inside of a part that is in no other one."""
    import torch

    lists: list[tuple[str, torch.nn.ModuleList]] = []
    for name, part in skeleton.named_modules():
        is_list = isinstance(part, torch.nn.ModuleList) and name and _is_inside(name, root)
        if is_list and not any(_is_inside(name, other) for other, _ in lists):
            lists.append((name, part))
    return lists


def text_decoder(skeleton: torch.nn.Module) -> str:
    """Name of the part that text runs through; empty for the whole of a model whose config has no part for text."""
    if not _has_other_parts(skeleton):
        return ""
    decoder = skeleton.get_decoder()
    return next((name for name, part in skeleton.named_modules() if part is decoder), "")


def towers(skeleton: torch.nn.Module, modules: list[str]) -> dict[str, str]:
    """Module -> the tower that it is a part of, of those linears outside of the blocks that are in one.

    A tower is the outermost part with nothing of the text decoder in it which is no output head. Inside the decoder,
    where some classes keep theirs, only its name tells a tower from an adapter of the text.
    """
    root, found = text_decoder(skeleton), {}
    head = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    for module in modules:
        if root and not _is_inside(module, root):
            if skeleton.get_submodule(module) is not head:
                found[module] = _outermost(module, root)
        elif tower_of(module) is not None:
            found[module] = module
    return found


def _has_other_parts(skeleton: torch.nn.Module) -> bool:
    """Whether the config describes more than a language model."""
    config = skeleton.config
    return config.get_text_config() is not config


def _is_inside(name: str, root: str) -> bool:
    """Whether a module is the part called `root`, or in it."""
    return not root or name == root or name.startswith(f"{root}.")


def _outermost(module: str, root: str) -> str:
    """The longest beginning of a module's name that is no part of the way to the decoder."""
    pieces = module.split(".")
    way = root.split(".")
    shared = next((i for i, piece in enumerate(pieces) if way[i : i + 1] != [piece]), len(pieces))
    return ".".join(pieces[: shared + 1])
