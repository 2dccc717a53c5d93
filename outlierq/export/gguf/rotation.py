"""The rotary embedding in GGUF metadata: base, dimensions, scaling, and factors that are tensors of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from outlierq.core.errors import SourceError

# What is written of each way of scaling, behind "rope.scaling.", by its key in the config.
SCALINGS: dict[str, dict[str, tuple[str, str]]] = {
    "default": {},
    "linear": {"factor": ("factor", "f32")},
    "llama3": {},
    "yarn": {
        "factor": ("factor", "f32"),
        "original_max_position_embeddings": ("original_context_length", "u32"),
        "mscale_all_dim": ("yarn_log_multiplier", "f32"),
        "beta_fast": ("yarn_beta_fast", "f32"),
        "beta_slow": ("yarn_beta_slow", "f32"),
    },
    "longrope": {},
    "proportional": {},
}
# By what llama.cpp divides the frequency of channels that are not rotated.
STILL = 1e30


def rope_of(config: Mapping[str, Any], layers: str = "full_attention") -> Mapping[str, Any]:
    """The description of the rotary embedding, under its new or old name; of one kind of layers where they differ."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        rope = rope.get(layers) or {}
    return rope


def rope_type(config: Mapping[str, Any]) -> str:
    """How the rotary embedding is scaled; "default" is not at all."""
    rope = rope_of(config)
    return str(rope.get("rope_type", rope.get("type", "default")) or "default")


def theta(config: Mapping[str, Any], layers: str = "full_attention") -> float:
    """The base of the rotary frequencies. SourceError where it is none."""
    base = float(rope_of(config, layers).get("rope_theta") or config.get("rope_theta") or 10000.0)
    if not base > 0:
        raise SourceError(f"rope_theta is {base:g}; rotary frequencies need a positive one")
    return base


def head_size(config: Mapping[str, Any]) -> int:
    """Channels of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rotated_size(config: Mapping[str, Any], part: float = 1.0) -> int:
    """Channels of a head that are rotated. part: share of them where the config does not say it."""
    rope = rope_of(config)
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or part
    if rope_type(config) == "proportional":  # its other channels are rotated by nothing
        share = 1.0
    return int(head_size(config) * share)


def rotation_keys(config: Mapping[str, Any], part: float) -> Iterator[tuple[str, str, Any]]:
    """(key behind the name of the architecture, type, value). SourceError for a scaling that is not known here."""
    yield "rope.freq_base", "f32", theta(config)
    yield "rope.dimension_count", "u32", rotated_size(config, part)
    if any(isinstance(value, Mapping) for value in (config.get("rope_parameters") or {}).values()):
        yield "rope.freq_base_swa", "f32", theta(config, "sliding_attention")
    kind, rope = rope_type(config), rope_of(config)
    _check_attention_factor(kind, rope)
    if kind in ("linear", "yarn", "longrope"):
        yield "rope.scaling.type", "text", kind
    for key, (name, value_type) in SCALINGS[kind].items():
        if rope.get(key) is not None:  # llama.cpp divides the multiplier by the factor of its formula
            yield f"rope.scaling.{name}", value_type, 0.1 * rope[key] if key == "mscale_all_dim" else rope[key]
    if kind == "longrope":
        yield "rope.scaling.attn_factor", "f32", _attention_factor(config)


def rope_tensors(config: Mapping[str, Any], part: float = 1.0) -> dict[str, list[float]]:
    """Factors of the frequencies by the tensor that llama.cpp reads them from; none where nothing is scaled so."""
    kind, rope = rope_type(config), rope_of(config)
    if kind == "llama3":
        return {"rope_freqs.weight": rope_factors(config, part)}
    if kind == "proportional" or config.get("model_type") == "gemma4_text":  # which llama.cpp reads in any case
        return {"rope_freqs.weight": _proportional(config)}
    if kind != "longrope":
        return {}
    factors = {f"rope_factors_{kind}.weight": list(rope.get(f"{kind}_factor") or ()) for kind in ("long", "short")}
    for name, values in factors.items():
        if len(values) != rotated_size(config, part) // 2:
            raise SourceError(f"{name} would have {len(values)} factors for {rotated_size(config, part)} channels")
    return factors


def _proportional(config: Mapping[str, Any]) -> list[float]:
    """Factors that leave the last channels of each half of a head as they are, [channels / 2]."""
    rope, half = rope_of(config), head_size(config) // 2
    rotated = int((rope.get("partial_rotary_factor") or 1.0) * half)
    return [float(rope.get("factor") or 1.0)] * rotated + [STILL] * (half - rotated)


def rope_factors(config: Mapping[str, Any], part: float = 1.0) -> list[float]:
    """By what Llama 3 divides each rotary frequency, [rotated channels / 2].

    A wave that turns at least `high_freq_factor` times in the original context stays, one that turns less than
    `low_freq_factor` times is made `factor` times longer; between, the frequency is a mean of both, by number of turns.
    """
    rope, base, size = rope_of(config), theta(config), rotated_size(config, part)
    try:
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        factors = []
        for index in range(0, size, 2):
            turns = rope["original_max_position_embeddings"] / (2 * math.pi * base ** (index / size))
            share = min(1.0, max(0.0, (turns - low) / (high - low)))
            factors.append(1 / (share + (1 - share) / factor))
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise SourceError(f"the scaling of the rotary embedding is not that of Llama 3: {error}") from error
    return factors


def rounded_bounds(config: Mapping[str, Any]) -> list[str]:
    """A sentence where YaRN's bounds are no whole dimensions; none otherwise."""
    if rope_type(config) != "yarn" or rope_of(config).get("truncate", True):
        return []
    return [
        "llama.cpp rounds the bounds of YaRN to whole dimensions, which this model does not: logits differ by 0.2 %"
    ]


def _check_attention_factor(kind: str, rope: Mapping[str, Any]) -> None:
    """SourceError for YaRN with another factor than the one that follows from how much longer the context becomes."""
    factor, given = rope.get("factor"), rope.get("attention_factor")
    if kind == "yarn" and factor and given and abs(given - (0.1 * math.log(factor) + 1)) > 1e-3:
        raise SourceError(f"the rotary embedding has attention_factor {given:g}, which llama.cpp does not know")
    if kind == "yarn" and (rope.get("mscale") or None) != (rope.get("mscale_all_dim") or None):
        raise SourceError("the rotary embedding has mscale beside mscale_all_dim, which llama.cpp does not know")


def _attention_factor(config: Mapping[str, Any]) -> float:
    """By what longrope multiplies attention scores' operands: as the config says, or from the growth of the context."""
    rope = rope_of(config)
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if rope.get("attention_factor"):
        return float(rope["attention_factor"])
    if not original:
        raise SourceError("the scaling of the rotary embedding names no original_max_position_embeddings")
    growth = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
