"""YAML -> checked, frozen `Recipe`; `loading` has the order in which that happens."""

from outlierq.recipe.loading import USUAL_RECIPE, RecipeLike, Settings, as_texts, given, load, parse, text_of
from outlierq.recipe.published import HUB, is_published, recipe_yaml
from outlierq.recipe.schema import Recipe
from outlierq.recipe.sections import (
    Activations,
    Calibration,
    Export,
    Gate,
    GroupPolicy,
    KVCache,
    Learn,
    Override,
    Quantize,
    TextSource,
    Transform,
    parse_size,
)
from outlierq.recipe.shipped import description, find, read, shipped

__all__ = [
    "HUB",
    "USUAL_RECIPE",
    "Activations",
    "Calibration",
    "Export",
    "Gate",
    "GroupPolicy",
    "KVCache",
    "Learn",
    "Override",
    "Quantize",
    "Recipe",
    "RecipeLike",
    "Settings",
    "TextSource",
    "Transform",
    "as_texts",
    "description",
    "find",
    "given",
    "is_published",
    "load",
    "parse",
    "parse_size",
    "read",
    "recipe_yaml",
    "shipped",
    "text_of",
]
