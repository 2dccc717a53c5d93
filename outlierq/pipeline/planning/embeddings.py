"""Tables of embeddings as sites, where a recipe has a type of GGUF for them."""

from __future__ import annotations

from dataclasses import replace

from outlierq.core.model import EMBEDDING, LinearSite, StudiedModel
from outlierq.recipe import Recipe


def with_embeddings(model: StudiedModel, recipe: Recipe) -> StudiedModel:
    """The model with its table of token embeddings among the sites outside of the blocks, where the recipe asks.

    A tied head is the same tensor, and gets the same type.
    """
    quantize = recipe.quantize
    if quantize is None or (quantize.embeddings is None and quantize.mix is None):
        return model
    table = model.skeleton.get_input_embeddings()
    module = next(name for name, each in model.skeleton.named_modules() if each is table)
    weight, structure = model.names[f"{module}.weight"], model.structure
    rows, columns = model.checkpoint.tensors[weight].shape
    site = LinearSite(module, weight, None, rows, columns, None, kind=EMBEDDING)
    outside = tuple(name for name in structure.outside_tensors if name != weight)
    structure = replace(structure, outside_sites=(*structure.outside_sites, site), outside_tensors=outside)
    return replace(model, structure=structure)
