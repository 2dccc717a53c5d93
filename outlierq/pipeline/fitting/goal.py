"""What a checkpoint shall be: at most so many bytes, bits per weight, memory of a card, or so much KL divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlierq.core.errors import ArgumentError
from outlierq.pipeline.fitting.layers import Layer, site_bytes
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import parse_size

# Of a card's memory; the rest is for activations, graphs and the runtime. vLLM's own share (--gpu-memory-utilization).
CARD_SHARE = 0.9
CACHE_BYTES = 2  # of a number in the cache in 16 bits


@dataclass(frozen=True)
class Budget:
    """A limit on what a plan takes. argument: by which it was asked. of: what counts, in the unit of `limit`.

    words: what counts, for people. per_byte: what a byte counts.
    """

    argument: str
    limit: float
    of: Callable[[Plan], float]
    words: str
    unit: str = "bytes"
    per_byte: float = 1.0

    def shown(self, value: float) -> str:
        """A value in its unit."""
        return f"{value:,.0f} bytes" if self.unit == "bytes" else f"{value:.4g} {self.unit}"


def size_budget(size: str) -> Budget:
    """Bytes of the whole result without its report: weights, config, tokenizer and other files."""
    return Budget("size", _bytes(size, "size"), lambda plan: plan.output_bytes, "the checkpoint")


def bits_budget(bits: float, layers: Sequence[Layer]) -> Budget:
    """Mean bits of a weight of these layers, scales and zero points included."""
    if not 0 < bits <= 32:
        raise ArgumentError(f"{bits:g} is no number of bits for a weight", argument="bits")
    sites, weights = {site for layer in layers for site in layer.sites}, sum(layer.weights for layer in layers)

    def held(plan: Plan) -> float:
        schemes = {planned.site: planned.scheme for planned in plan.sites}
        sizes = (site_bytes(plan, site, schemes.get(site)) for site in sites)
        return 8 * sum(sizes) / weights

    return Budget("bits", bits, held, "a weight of the linears", "bits", 8 / weights)


def card_budget(card: str, context: int, plan: Plan, *, cache_bytes: int = CACHE_BYTES) -> Budget:
    """Bytes of a card that weights and the KV cache of `context` tokens take."""
    config = cache_shape(plan)
    if config is None:
        raise ArgumentError("how large the cache of this model is, is not known; give --size", argument="card")
    cache, limit = cache_size(config, context, cache_bytes), _bytes(card, "card")
    if context < 1:
        raise ArgumentError(f"a context of {context} tokens holds nothing", argument="context")
    return Budget(
        "card",
        int(limit * CARD_SHARE),
        lambda plan: loaded_bytes(plan) + cache,
        f"weights, and {cache:,} bytes of cache for {context:,} tokens, in {CARD_SHARE:.0%} of the card,",
    )


def cache_shape(plan: Plan) -> dict[str, Any] | None:
    """What the size of a cache depends on, as transformers names it; None where a config does not say."""
    text = plan.model.skeleton.config.get_text_config()
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    others = ("num_key_value_heads", "head_dim", "layer_types", "sliding_window", "kv_lora_rank", "qk_rope_head_dim")
    shape = {name: getattr(text, name, None) for name in (*needed, *others, "max_position_embeddings")}
    return shape if all(isinstance(shape[name], int) for name in needed) else None


def loaded_bytes(plan: Plan) -> int:
    """Bytes of all tensors of the result."""
    return sum(place.tensor.nbytes for place in plan.layout.places.values())


def cache_size(config: Mapping[str, Any], context: int, cache_bytes: int = CACHE_BYTES) -> int:
    """Bytes of the keys and values of `context` tokens, as the config tells.

    Layers with a sliding window keep no more than that; those of linear attention keep nothing that grows. Multi-head
    latent attention keeps one compressed vector and the rotary part of one key.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kinds = text.get("layer_types") or ["full_attention"] * layers
    if text.get("kv_lora_rank"):
        width = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
    else:
        width = (
            2
            * int(text.get("num_key_value_heads") or heads)
            * int(text.get("head_dim") or int(text["hidden_size"]) // heads)
        )
    window = int(text.get("sliding_window") or context)
    tokens = sum(_held_tokens(str(kind), context, window) for kind in kinds)
    return tokens * width * cache_bytes


def _held_tokens(kind: str, context: int, window: int) -> int:
    """Tokens that a layer of this kind keeps."""
    if "linear" in kind or "mamba" in kind or "conv" in kind:
        return 0
    return min(context, window) if "sliding" in kind or "chunked" in kind else context


def _bytes(text: str, argument: str) -> int:
    """The bytes of a size like "18GiB"; ArgumentError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentError(str(error), argument=argument) from None
