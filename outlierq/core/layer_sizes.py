"""Sizes in a config of transformers that may differ from layer to layer.

Where they do (the head size of Gemma 4), transformers refuses to say one for the whole model.
"""

from __future__ import annotations

from typing import Any


def sizes(config: Any, key: str) -> list[Any]:
    """The different values of a key in a config and those of its layers, in order of layers; empty without the key."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,)
    values = [getattr(layer, key, None) for layer in layers]
    return list(dict.fromkeys(value for value in values if value is not None))


def largest(config: Any, key: str, default: int = 0) -> int:
    """The largest of the numbers that layers have for a key; `default` when there is none."""
    return max((value for value in sizes(config, key) if isinstance(value, int)), default=default)
