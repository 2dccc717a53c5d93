"""A choice for every layer as an ordinary recipe: the commonest scheme for all, overrides for the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from outlierq.core.model import EMBEDDING, LinearSite
from outlierq.pipeline.fitting.layers import Layer, Storage
from outlierq.pipeline.fitting.storage import keys_of, rounding
from outlierq.recipe import Recipe, parse
from outlierq.recipe.patterns import EXPRESSION

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def recipe_text(base: Recipe, layers: Sequence[Layer], chosen: Sequence[Storage], description: str) -> str:
    """The recipe as YAML. chosen: how each of the layers is stored; the others stay as `base` has them."""
    section = rounding(base)
    usual = _commonest(layers, chosen)
    described = {"description": description, **_plain(base, {"name", "description", "quantize"})}
    storing = {**keys_of(usual), "when_indivisible": section.when_indivisible} if usual else {}
    quantize: dict[str, Any] = {"method": section.method, **storing}
    own = section.model_dump(mode="json", exclude_defaults=True)
    quantize |= _outside(own, layers, chosen) | section.options
    quantize["overrides"] = [*own.get("overrides", []), *overrides(layers, chosen, usual)]
    order = {key: value for key, value in described.items() if key != "export"}
    values = {**order, "quantize": quantize, "export": base.export.model_dump(mode="json")}
    text: str = yaml.safe_dump(values, sort_keys=False, width=1 << 20, allow_unicode=True, default_flow_style=None)
    return text


def recipe_with(base: Recipe, layers: Sequence[Layer], chosen: Sequence[Storage], description: str = "") -> Recipe:
    """The same, read and checked."""
    return parse(recipe_text(base, layers, chosen, description), name="fit")


def _outside(own: Mapping[str, Any], layers: Sequence[Layer], chosen: Sequence[Storage]) -> dict[str, Any]:
    """The keys on what is outside of the blocks. own: those of the base; the table of embeddings may be chosen."""
    keys = {key: own[key] for key in ("ignore", "embeddings") if key in own}
    for layer, storage in zip(layers, chosen, strict=True):
        if layer.sites[0].kind == EMBEDDING:
            type = keys.pop("embeddings")
            keys |= {} if storage is None else {"embeddings": storage.type or type}
    return keys


def _plain(recipe: Recipe, without: set[str]) -> dict[str, Any]:
    """The sections that are set, as plain values; options of a method are keys of its section."""
    values = recipe.model_dump(mode="json", exclude=without, exclude_none=True, exclude_defaults=True)
    for step in values.get("transform", ()):
        step |= step.pop("options", {})
    return values


def _commonest(layers: Sequence[Layer], chosen: Sequence[Storage]) -> Storage:
    """The scheme of most weights in blocks, or of tables where those are kept; None when all layers are kept."""
    weights: Counter[Storage] = Counter()
    quantized = [(layer, storage) for layer, storage in zip(layers, chosen, strict=True) if storage is not None]
    inside = [(layer, storage) for layer, storage in quantized if not layer.is_table]
    for layer, storage in inside or quantized:
        weights[storage] += layer.weights
    return max(weights, key=lambda scheme: (weights[scheme], str(scheme)), default=None)


def overrides(layers: Sequence[Layer], chosen: Sequence[Storage], usual: Storage) -> list[dict[str, Any]]:
    """One override for each kind of linear and scheme that is not the usual one.

    The output head, which no pattern ignores any more, is always named; the table of embeddings has a key of its own.
    """
    modules: dict[tuple[str, Storage], list[str]] = {}
    for layer, storage in zip(layers, chosen, strict=True):
        if (storage != usual or layer.is_table) and layer.sites[0].kind != EMBEDDING:
            for kind, names in kinds(layer.sites).items():
                modules.setdefault((kind, storage), []).extend(names)
    return [
        {"match": pattern(names), **({"keep": True} if storage is None else keys_of(storage))}
        for (_, storage), names in modules.items()
    ]


def kinds(sites: Iterable[LinearSite]) -> Mapping[str, list[str]]:
    """The modules of a layer, those that differ in a number or in the last name only together."""
    modules: dict[str, list[str]] = {}
    for site in sites:
        parent = site.module.rpartition(".")[0]
        modules.setdefault(NUMBER.sub("#", parent + "."), []).append(site.module)
    return {
        f"{kind}({'|'.join(sorted({n.rpartition('.')[2] for n in names}))})": names for kind, names in modules.items()
    }


def pattern(modules: Sequence[str]) -> str:
    """A regular expression for these modules, which differ in numbers and last names in all combinations."""
    parts = [module.split(".") for module in modules]
    words = [list(dict.fromkeys(column)) for column in zip(*parts, strict=True)]
    count = 1
    for column in words:
        count *= len(column)
    if count != len(set(modules)):
        return EXPRESSION + "(" + "|".join(map(re.escape, dict.fromkeys(modules))) + ")$"
    return EXPRESSION + r"\.".join(map(_either, words)) + "$"


def _either(words: Sequence[str]) -> str:
    """One of some words."""
    escaped = list(map(re.escape, words))
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
