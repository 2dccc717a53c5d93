"""YAML -> checked, frozen `Recipe`; `loading` has the order in which that happens."""

from outlierq.recipe.loading import load, parse
from outlierq.recipe.schema import Recipe
from outlierq.recipe.sections import (
    Activations,
    Calibration,
    Export,
    Gate,
    GroupPolicy,
    KVCache,
    Override,
    Quantize,
    TextSource,
    Transform,
    parse_size,
)
from outlierq.recipe.shipped import description, find, read, shipped

__all__ = [
    "Activations",
    "Calibration",
    "Export",
    "Gate",
    "GroupPolicy",
    "KVCache",
    "Override",
    "Quantize",
    "Recipe",
    "TextSource",
    "Transform",
    "description",
    "find",
    "load",
    "parse",
    "parse_size",
    "read",
    "shipped",
]
