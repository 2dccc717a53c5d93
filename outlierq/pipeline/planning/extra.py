"""Blocks that predict further tokens, which most classes leave out: rounded like the others where no input is needed.

Such a block is known by what it holds: every linear of one of the model's own blocks, by the same names and in the same
shapes (DeepSeek's last layer, `mtp.layers.0` of Qwen3-Next). A recipe that needs statistics keeps it: no forward of the
class shows its inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from outlierq.recipe.patterns import tower_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outlierq.core.model import Block, LinearSite, StudiedModel
    from outlierq.recipe import Recipe

# The block that a tensor is in, and the rest of its name.
IN_BLOCK = re.compile(r"(.*?\.\d+)\.(.+)")


def with_extra_blocks(model: StudiedModel, recipe: Recipe) -> StudiedModel:
    """The model with the linears of such blocks among the sites outside of its own, where a recipe looks at no data."""
    if recipe.quantize is None or recipe.needs or recipe.transform or recipe.export.format != "compressed-tensors":
        return model
    structure = model.structure
    sites = tuple(_extra_sites(model))
    taken = {tensor for site in sites for tensor in (site.weight, site.bias)}
    left = tuple(name for name in structure.outside_tensors if name not in taken)
    structure = replace(structure, outside_sites=(*structure.outside_sites, *sites), outside_tensors=left)
    return replace(model, structure=structure) if sites else model


def _extra_sites(model: StudiedModel) -> Iterator[LinearSite]:
    """The linears of every block that the class does not have."""
    known = set(model.names.values())
    unknown: dict[str, set[str]] = {}
    for name in model.structure.outside_tensors:
        parts = None if name in known else IN_BLOCK.fullmatch(name)
        if parts is not None and tower_of(name) is None:
            unknown.setdefault(parts[1], set()).add(parts[2])
    kinds = [_by_rest(block) for block in model.structure.blocks]
    for prefix, rests in unknown.items():
        fitting = next((sites for sites in kinds if sites and _holds_all(model, prefix, rests, sites)), {})
        for rest, site in fitting.items():
            yield _moved(site, prefix, rest, rests)


def _by_rest(block: Block) -> dict[str, LinearSite]:
    """The linears of a block by what follows its name in those of their weights."""
    found = {site: IN_BLOCK.fullmatch(site.weight) for site in block.sites}
    return {parts[2]: site for site, parts in found.items() if parts is not None}


def _holds_all(model: StudiedModel, prefix: str, rests: set[str], sites: Mapping[str, LinearSite]) -> bool:
    """Whether an unknown block has every linear of a known one, in its shape."""
    tensors = model.checkpoint.tensors
    shapes = {rest: tensors[site.weight].shape for rest, site in sites.items()}
    return all(rest in rests and tensors[f"{prefix}.{rest}"].shape == shape for rest, shape in shapes.items())


def _moved(site: LinearSite, prefix: str, rest: str, rests: set[str]) -> LinearSite:
    """A linear of a known block as that of an unknown one."""
    module = f"{prefix}.{rest}".removesuffix(".weight")
    bias = rest.removesuffix("weight") + "bias"
    # What follows an expert's name in a linear's is the same.
    expert = site.expert and module.removesuffix(site.module.removeprefix(site.expert))
    return replace(
        site,
        module=module,
        weight=f"{prefix}.{rest}",
        bias=f"{prefix}.{bias}" if bias in rests else None,
        block=None,
        expert=expert,
    )
