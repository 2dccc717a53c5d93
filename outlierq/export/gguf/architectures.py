"""Which models of transformers become GGUF files, and how: the rows of data/gguf_architectures.json.

Each was proved against llama.cpp: its logits on the file are those of transformers (tests/clients/test_gguf.py). What a
row does not handle is refused: a key of the config that transformers knows, that differs from what the class has by
itself, and of which nothing is written, would change the model without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief
from outlierq.core.model import HARMLESS_KEYS
from outlierq.export.gguf.rotation import rope_of, rope_type

LIKE = "write it into the frame of a file of llama.cpp's own converter: --like model-f16.gguf"
SLIDING, FULL = "sliding_attention", "full_attention"
# What Qwen3.5 has where its config says nothing (transformers' class).
TEXT_SECTIONS = (11, 11, 10)
# By these numbers of layers llama.cpp knows DeepSeek-V2-Lite and its kin.
LITE_LAYERS = (26, 27)


@dataclass(frozen=True)
class Architecture:
    """One model_type of transformers. name: llama.cpp's architecture.

    keys: metadata beside the usual, key -> [type, keys of the config that may have it, or a number]. must: key -> the
    value that it must have, or the key whose value it must have. rotated: rows of queries and keys pair neighbours in
    the file. gains_less_one: gains of norms are stored as w - 1. experts: a mixture. windows: which layers look at a
    window is written; no_windows: it must have none. written_window: the window that a file without one says. part: of
    a head that is rotated where the config does not say it. untied: whether there may be a head of its own.
    windows_at: the only number of layers with which llama.cpp looks at windows. handled: further keys of the config
    that are looked at. activation: the one that llama.cpp computes. no_rope_every: layers of this step that llama.cpp
    does not rotate. scaled: it multiplies products by a number beside each matrix, which NVFP4 needs.
    """

    name: str
    keys: Mapping[str, list[Any]] = field(default_factory=dict)
    must: Mapping[str, Any] = field(default_factory=dict)
    rotated: bool = False
    gains_less_one: bool = False
    experts: bool = False
    windows: bool = False
    windows_at: int | None = None
    handled: tuple[str, ...] = ()
    no_windows: bool = False
    written_window: int | None = None
    part: float = 1.0
    untied: bool = True
    activation: str = "silu"
    no_rope_every: int | None = None
    scaled: bool = False


@cache
def architectures() -> dict[str, Architecture]:
    """By model_type."""
    return {model_type: Architecture(**row) for model_type, row in _table()["models"].items()}


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The row of a model, or of the language model in it; None where there is none."""
    return architectures().get(str(text_of(config).get("model_type")))


def known_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """The same; SourceError where there is none."""
    architecture = architecture_of(config)
    if architecture is None:
        raise SourceError(
            f"GGUF files are written for {', '.join(architectures())} models; {source} is a {config.get('model_type')}",
            hint=LIKE,
        )
    return architecture


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "model_type" in inner else config


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model with all that its class has by itself. SourceError where it is not valid."""
    from transformers import CONFIG_MAPPING

    config = text_of(config)
    try:
        return dict(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise SourceError(f"the config is not valid: {error}") from error


def check_config(architecture: Architecture, config: Mapping[str, Any], source: str) -> None:
    """SourceError for what llama.cpp does not compute as transformers does, or of which nothing is known here."""
    for key, meant in architecture.must.items():
        meant = config.get(meant, meant) if isinstance(meant, str) else meant
        if config.get(key) not in (meant, None):
            raise SourceError(
                f"{source} has {key} {brief(config[key], 80)}, and llama.cpp computes its architecture with "
                f"{brief(meant, 80)}",
                hint=LIKE,
            )
    activation = config.get("hidden_activation") or config.get("hidden_act") or architecture.activation
    if activation != architecture.activation:
        raise SourceError(
            f"{source} has the activation {activation}; llama.cpp computes {architecture.activation}", hint=LIKE
        )
    if _windowed(config) and (
        architecture.no_windows or architecture.windows_at not in (None, config["num_hidden_layers"])
    ):
        raise SourceError(
            f"{source} attends to a window of {config['sliding_window']} tokens, which llama.cpp does not do for this "
            "architecture",
            hint=LIKE,
        )
    step, layers = architecture.no_rope_every, config.get("no_rope_layers") or []
    if step and layers != [int((number + 1) % step != 0) for number in range(len(layers))]:
        raise SourceError(
            f"{source} rotates the layers {brief(layers, 80)}; llama.cpp leaves out every {step}th", hint=LIKE
        )
    unknown = [key for key in _changed_keys(config) if key not in _handled(architecture)]
    if unknown:
        raise SourceError(
            f"{source} has {unknown[0]} {brief(config[unknown[0]], 80)}; how llama.cpp computes that is not known here",
            hint=LIKE,
        )


def _windowed(config: Mapping[str, Any]) -> bool:
    """Whether some layer looks at a window of tokens only."""
    layers = config.get("layer_types")
    if not config.get("sliding_window") or not config.get("use_sliding_window", True):
        return False
    return layers is None or SLIDING in layers


def _changed_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys that the class knows, and that have another value than it has by itself."""
    from transformers import CONFIG_MAPPING

    usual = CONFIG_MAPPING[config["model_type"]]().to_dict()
    for key, value in config.items():
        if key in usual and value != usual[key] and not HARMLESS_KEYS.fullmatch(key):
            yield key


def _handled(architecture: Architecture) -> set[str]:
    """Keys of the config that are looked at."""
    table = _table()
    sources = [*table["common"].values(), *architecture.keys.values()]
    sources += table["experts"].values() if architecture.experts else []
    return {
        *table["handled"],
        *architecture.handled,
        *architecture.must,
        *(key for source in sources for key in source[1:]),
    }


def _lfm2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Key-value heads by layer, none in convolutions; the width of the feed-forward part as the class computes it."""
    heads = [config["num_key_value_heads"] if layer == "full_attention" else 0 for layer in config["layer_types"]]
    width = config["intermediate_size"]
    if config.get("block_auto_adjust_ff_dim"):
        width = int(2 * width / 3)
        width = int(width * (config.get("block_ffn_dim_multiplier") or 1.0))
        width += -width % config["block_multiple_of"]
    return {"num_key_value_heads": heads, "intermediate_size": width}


def _deepseek2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Queries that look at the compressed keys: one head of those. SourceError for what llama.cpp has otherwise."""
    rope = rope_of(config)
    if rope_type(config) == "yarn" and not rope.get("mscale_all_dim"):
        raise SourceError("the rotary embedding is scaled without mscale_all_dim, which llama.cpp needs", hint=LIKE)
    if config.get("q_lora_rank") is None and config["num_hidden_layers"] not in LITE_LAYERS:
        raise SourceError(
            f"queries are not compressed, and llama.cpp reads such models of {' or '.join(map(str, LITE_LAYERS))} "
            f"layers only, not of {config['num_hidden_layers']}",
            hint=LIKE,
        )
    rotated = config["qk_rope_head_dim"]
    lengths = {"_key_length": config["kv_lora_rank"] + rotated, "_key_length_mla": config["qk_nope_head_dim"] + rotated}
    return {"num_key_value_heads": 1, **lengths}


def _delta_net(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers are recurrent, and the width of their values."""
    return {
        "_recurrent_layers": [layer == "linear_attention" for layer in config["layer_types"]],
        "_inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
    }


def _qwen35(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same, and the parts of a head that turn with time, height and width, which are one for text. SourceError for
    more heads of values than of keys: llama.cpp has those in another order, also in columns."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if keys != values:
        raise SourceError(
            f"the linear attention has {values} heads of values for {keys} of keys, which llama.cpp has in another "
            "order; that is not written here",
            hint="make model-f16.gguf with llama.cpp's converter and compress that: outlierq quantize model-f16.gguf",
        )
    sections = list(rope_of(config).get("mrope_section") or TEXT_SECTIONS)[:3]
    return {**_delta_net(config), "_sections": [*sections, 0]}


def _gemma4(config: Mapping[str, Any]) -> dict[str, Any]:
    """What layers that look at everything have otherwise than those of windows, and where keys are shared. SourceError
    for layers that differ in another way, and for keys of other layers than llama.cpp takes."""
    layers, shared = config["layer_types"], config["num_kv_shared_layers"]
    own, width = len(layers) - shared, config["intermediate_size"]
    if shared and layers[max(0, own - 2) : own] != [SLIDING, FULL]:
        raise SourceError(
            f"layers from {own} on share keys, and llama.cpp takes those of the last two before, {SLIDING} and {FULL}; "
            f"here these are {' and '.join(layers[max(0, own - 2) : own])}",
            hint=LIKE,
        )
    if config["hidden_size_per_layer_input"] and config["vocab_size_per_layer_input"] != config["vocab_size"]:
        raise SourceError("the embeddings of every layer have another vocabulary than the first ones", hint=LIKE)
    wider = _of_full_layers(config)
    sizes = {"head_dim": wider["head_dim"], "_head_dim_of_windows": config["head_dim"]}
    if wider["num_key_value_heads"] != config["num_key_value_heads"]:
        heads = (wider if layer == FULL else config for layer in layers)
        sizes["num_key_value_heads"] = [each["num_key_value_heads"] for each in heads]
    if shared and config["use_double_wide_mlp"]:
        sizes["intermediate_size"] = [width] * own + [2 * width] * shared
    return sizes if config["enable_moe_block"] else {**sizes, "num_experts": None, "top_k_experts": None}


def _of_full_layers(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of heads, and numbers of those of keys, of layers that look at everything. SourceError where layers of one
    kind differ, or in anything else."""
    usual = {key: int(config[key]) for key in ("head_dim", "num_key_value_heads")}
    apart = {int(number): dict(said) for number, said in (config.get("per_layer_config") or {}).items()}
    kinds: dict[str, list[dict[str, int]]] = {}
    for number, layer in enumerate(config["layer_types"]):
        kinds.setdefault(layer, []).append({**usual, **apart.get(number, {})})
    full: dict[str, int] = kinds.get(FULL, [usual])[0]
    meant = {FULL: full, SLIDING: usual}
    if full.keys() != usual.keys() or any(each != meant.get(layer) for layer in kinds for each in kinds[layer]):
        raise SourceError("layers of one kind differ in their sizes, which llama.cpp does not know", hint=LIKE)
    return full


# What is written instead of what the config has, by llama.cpp's architecture.
ADJUSTED: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "lfm2": _lfm2,
    "deepseek2": _deepseek2,
    "qwen3next": _delta_net,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "gemma4": _gemma4,
}


def adjusted(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as llama.cpp describes the model."""
    change = ADJUSTED.get(architecture.name)
    return {**config, **(change(config) if change else {})}


def usual_keys(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key behind the name of the architecture, type, value) of what most models have. config: of `whole_config`."""
    return _values(config, _table()["common"])


def own_keys(architecture: Architecture, config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The same of what is particular: experts, windows, factors."""
    yield from _values(config, {**(_table()["experts"] if architecture.experts else {}), **architecture.keys})
    if architecture.windows and _windowed(config):
        yield "attention.sliding_window", "u32", config["sliding_window"]
        layers = config.get("layer_types") or []
        yield "attention.sliding_window_pattern", "bool", [layer == SLIDING for layer in layers]
    elif architecture.written_window is not None:
        yield "attention.sliding_window", "u32", architecture.written_window


def _values(config: Mapping[str, Any], keys: Mapping[str, list[Any]]) -> Iterator[tuple[str, str, Any]]:
    """The first value that is there, by key."""
    for key, (kind, *sources) in keys.items():
        # A number stands for itself.
        found = (config.get(source) if isinstance(source, str) else source for source in sources)
        value = next((each for each in found if each is not None), None)
        if value is not None:
            yield key, kind, value


@cache
def _table() -> dict[str, Any]:
    """The content of the table."""
    text = (resources.files("outlierq") / "data" / "gguf_architectures.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
