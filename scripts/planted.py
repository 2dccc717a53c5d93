"""The faults that `plant_faults.py` plants: each changes one thing in a copy of a sound export.

A fault is a function of a `Copy`, which holds tensors and JSON files of the export; what it changes is written back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SITE, OTHER = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
SQUARE = "model.layers.0.self_attn.q_proj"
CODES = ("weight_packed", "qweight", "weight")
SCALES = ("weight_scale", "scales", "SCB")
ZEROS = ("weight_zero_point", "qzeros")


class NoFaultError(Exception):
    """A change that leaves the export as it was."""


@dataclass
class Copy:
    """A copy of an export. written: names of the JSON files that were changed."""

    folder: Path
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    json: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Copy:
        """Everything read."""
        path = folder / "model.safetensors"
        files = {p.name: json.loads(p.read_text()) for p in folder.glob("*.json") if p.name != "outlierq.json"}
        return cls(folder, load_file(path) if path.exists() else {}, files)

    def save(self) -> None:
        """Everything written back, but what a fault has removed."""
        if self.tensors:
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, self.folder / "model.safetensors",
                      {"format": "pt"})  # fmt: skip
        for name, content in self.json.items():
            (self.folder / name).write_text(json.dumps(content, indent=2))

    def is_like(self, other: Copy) -> bool:
        """Whether tensors and JSON files are the same, bit for bit."""
        same = self.tensors.keys() == other.tensors.keys() and self.json == other.json
        return same and all(_bytes(t).equal(_bytes(other.tensors[name])) for name, t in self.tensors.items())

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.json["config.json"]

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config."""
        return self.config["quantization_config"]

    @property
    def group(self) -> dict[str, Any]:
        """The first config group of compressed-tensors."""
        return self.quantization["config_groups"]["group_0"]

    def part(self, roles: tuple[str, ...], site: str = SITE) -> str:
        """Name of the tensor of a site that has one of these roles."""
        return next(f"{site}.{role}" for role in roles if f"{site}.{role}" in self.tensors)

    def roles(self, site: str = SITE) -> list[str]:
        """All tensors of a linear, by the last part of their names."""
        return [name.removeprefix(f"{site}.") for name in self.tensors if name.startswith(f"{site}.")]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


Change = Callable[[Copy], Any]
Edit = Callable[[torch.Tensor], torch.Tensor]


def _tensor(name: str, change: Edit) -> Change:
    def apply(copy: Copy) -> None:
        copy.tensors[name] = change(copy.tensors[name])

    return apply


def _part(roles: tuple[str, ...], change: Edit, site: str = SITE) -> Change:
    def apply(copy: Copy) -> None:
        name = copy.part(roles, site)
        copy.tensors[name] = change(copy.tensors[name].clone())

    return apply


def _set(where: tuple[str, ...], value: Any, file: str = "config.json") -> Change:
    def apply(copy: Copy) -> None:
        place = copy.json[file]
        for key in where[:-1]:
            place = place[key]
        place[where[-1]] = value

    return apply


def _at(index: tuple[Any, ...], value: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        wide[index] = value(wide[index])
        return wide.to(tensor.dtype)

    return change


def _times(factor: float, index: tuple[Any, ...] = (...,)) -> Edit:
    return _at(index, lambda values: values * factor)


def _exponent(add: int, index: tuple[Any, ...] = (...,)) -> Edit:
    """Scales that are exponents: the same as a factor of 2^add."""
    return _at(index, lambda values: values + add)


def _swap(one: str, other: str) -> Change:
    def apply(copy: Copy) -> None:
        tensors = copy.tensors
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return apply


def _swapped(dim: int, first: int, second: int) -> Edit:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        order = list(range(tensor.shape[dim]))
        other = min(second, len(order) - 1)  # scales of blocks have few rows
        one = min(first, other - 1)
        order[one], order[other] = order[other], order[one]
        raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        return raw.index_select(dim, torch.tensor(order)).contiguous().view(tensor.dtype)

    return change


def _flipped(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    return raw.flip(0).contiguous().view(tensor.dtype)


def _bits(mask: int, index: tuple[int, ...] = (3, 2)) -> Edit:
    """Some bits of one word turned over."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        raw[index] = raw[index] ^ torch.tensor(mask, dtype=raw.dtype)
        return raw.view(tensor.dtype)

    return change


def _exchange(site: str, other: str) -> Change:
    def apply(copy: Copy) -> None:
        for role in copy.roles(site):
            _swap(f"{site}.{role}", f"{other}.{role}")(copy)

    return apply


def _file(name: str, change: Callable[[Path], None]) -> Change:
    def apply(copy: Copy) -> None:
        copy.json.pop(name, None)
        if name == "model.safetensors":
            copy.tensors = {}
        change(copy.folder / name)

    return apply


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 64)


NORM0, NORM1 = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
EMBEDDING, HEAD, FINAL = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BIAS0, BIAS1 = "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"


def of_plain_tensors() -> Iterator[tuple[str, Change]]:
    """What is not quantized: each of it must be what the source holds."""
    yield "norm of zeros", _tensor(NORM0, torch.zeros_like)
    yield "norm negative", _tensor(NORM0, torch.neg)
    yield "norm x2", _tensor(NORM1, lambda t: t * 2)
    yield "norms of two layers exchanged", _swap(NORM0, NORM1)
    yield "norm as int32", _tensor(NORM0, lambda t: t.float().round().int())
    yield "one gain of a norm negative", _tensor(NORM1, _times(-1, (5,)))
    yield "final norm of ones", _tensor(FINAL, torch.ones_like)
    yield "embedding upside down", _tensor(EMBEDDING, lambda t: t.flip(0))
    yield "embedding x1000", _tensor(EMBEDDING, lambda t: t * 1000)
    yield "embedding with a row of zeros", _tensor(EMBEDDING, _times(0, (40,)))
    yield "two rows of the embedding exchanged", _tensor(EMBEDDING, _swapped(0, 40, 41))
    yield "head upside down", _tensor(HEAD, lambda t: t.flip(0))
    yield "head of zeros", _tensor(HEAD, torch.zeros_like)
    yield "one value of the head", _tensor(HEAD, _times(3, (7, 9)))
    yield "bias x100", _tensor(BIAS0, lambda t: t * 100)
    yield "biases exchanged", _swap(BIAS0, BIAS1)
    yield "bias NaN", _tensor(BIAS0, _times(float("nan"), (0,)))


def of_config() -> Iterator[tuple[str, Change]]:
    """config.json and generation_config.json against the source's."""
    yield "rope theta x50", _set(("rope_parameters", "rope_theta"), 500000.0)
    yield "eps 1e-2", _set(("rms_norm_eps",), 1e-2)
    yield "activation gelu", _set(("hidden_act",), "gelu")
    yield "4 heads to 8", lambda copy: copy.config.update(num_attention_heads=8, head_dim=32)
    yield "2 key-value heads to 1", _set(("num_key_value_heads",), 1)
    yield "another eos", _set(("eos_token_id",), 5)
    yield "pad id beyond the embedding", _set(("pad_token_id",), 100000)
    yield "positions x4", _set(("max_position_embeddings",), 2048)
    yield "another class", _set(("architectures",), ["LlamaForSequenceClassification"])
    yield "class of another model", _set(("architectures",), ["MistralForCausalLM"])
    yield "said to be tied", _set(("tie_word_embeddings",), True)
    yield "a layer fewer", _set(("num_hidden_layers",), 1)
    yield "model_type of another model", _set(("model_type",), "mistral")
    yield "vocabulary x2", _set(("vocab_size",), 640)
    yield "inner width half", _set(("intermediate_size",), 256)
    yield "heads of half the width", _set(("head_dim",), 32)
    yield "rope theta 1", _set(("rope_parameters", "rope_theta"), 1.0)
    yield "eps negative", _set(("rms_norm_eps",), -1e-5)
    yield "no biases", _set(("attention_bias",), False)
    yield "generation: another eos", _set(("eos_token_id",), 9, "generation_config.json")
    yield "generation: temperature 5", _set(("temperature",), 5.0, "generation_config.json")


def _vocabulary(change: Callable[[dict[str, int]], dict[str, int]]) -> Change:
    def apply(copy: Copy) -> None:
        model = copy.json["tokenizer.json"]["model"]
        model["vocab"] = change(model["vocab"])

    return apply


def _reversed(vocabulary: dict[str, int]) -> dict[str, int]:
    return dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))


def _beyond(vocabulary: dict[str, int]) -> dict[str, int]:
    return {**vocabulary, "zzzz": 5000}


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def of_tokens() -> Iterator[tuple[str, Change]]:
    """Tokenizer and chat template."""
    yield "vocabulary reversed", _vocabulary(_reversed)
    yield "two tokens with one id", _vocabulary(lambda ids: {**ids, "a": ids["b"]})
    yield "two tokens exchanged", _vocabulary(lambda ids: {**ids, "a": ids["b"], "b": ids["a"]})
    yield (
        "a template that does not end",
        _file("chat_template.jinja", lambda path: path.write_text("{% for m in messages %}")),
    )
    yield "no decoder of bytes", _set(("decoder",), None, "tokenizer.json")
    yield "an id beyond the embedding", _vocabulary(_beyond)
    yield (
        "no tokenizer",
        lambda copy: [_file(n, Path.unlink)(copy) for n in ("tokenizer.json", "tokenizer_config.json")],
    )
    yield "tokenizer.json is no JSON", _file("tokenizer.json", lambda path: path.write_text("{"))
    yield "tokenizer without a pre-tokenizer", _set(("pre_tokenizer",), None, "tokenizer.json")
    yield "another chat template", _file("chat_template.jinja", lambda path: path.write_text("{{ messages }}"))
    yield "another bos", _set(("bos_token",), "a", "tokenizer_config.json")
    yield (
        "a chat template beside that of the source",
        _file("chat_template.json", lambda path: path.write_text('{"chat_template": "x"}')),
    )


def of_files() -> Iterator[tuple[str, Change]]:
    """Whole files."""
    yield "weights cut off", _file("model.safetensors", _cut)
    yield "bytes behind the weights", _file("model.safetensors", _longer)
    yield "weights gone", _file("model.safetensors", Path.unlink)
    yield "config.json gone", _file("config.json", Path.unlink)
    yield "config.json is no JSON", _file("config.json", lambda path: path.write_text("nothing"))
    yield "a tensor too many", lambda copy: copy.tensors.update({"model.layers.0.extra.weight": torch.zeros(4, 4)})
    yield "a norm missing", lambda copy: copy.tensors.pop(NORM0)
    yield (
        "an index beside the only file",
        _file("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": "b.safetensors"}}')),
    )


def of_linear(kind: str) -> Iterator[tuple[str, Change]]:
    """The tensors of quantized linears. kind: of the export."""
    exponents = kind == "mxfp4"
    factor = (lambda f, i=(...,): _exponent({4: 2, 256: 8, 2: 1}[f], i)) if exponents else _times
    rows_last = kind in ("awq", "gptq", "gptq-asymmetric", "gptq-v2")
    row = (slice(None), 3) if rows_last else (3,)
    cell = (1, 3) if rows_last else (3, -1)
    if kind in ("llm-int8",):
        cell = row = (3,)
    yield "scales x4", _part(SCALES, factor(4))
    yield "a row of scales x4", _part(SCALES, factor(4, row))
    yield "one scale x256", _part(SCALES, factor(256, cell))
    yield "a row of scales x2", _part(SCALES, factor(2, row))
    yield "scales of two rows exchanged", _part(SCALES, _swapped(1 if rows_last else 0, 3, 20))
    if not exponents:
        yield "scales of zero", _part(SCALES, factor(0))
        yield "scales negative", _part(SCALES, factor(-1))
        yield "one scale 0", _part(SCALES, factor(0, cell))
        yield "one scale negative", _part(SCALES, factor(-1, cell))
        yield "a scale NaN", _part(SCALES, factor(float("nan"), cell))
        yield "a row of scales 0", _part(SCALES, factor(0, row))
    yield "codes of zero", _part(CODES, torch.zeros_like)
    yield "rows of codes in reverse", _part(CODES, _flipped)
    yield "two rows of codes exchanged", _part(CODES, _swapped(0, 3, 20))
    yield "two columns of words exchanged", _part(CODES, _swapped(1, 1, 6))
    yield "one code turned over", _part(CODES, _bits(0x08 if kind not in BYTES else 0x40))
    yield "one word turned over", _part(CODES, _bits(0x77))
    yield "two linears exchanged", _exchange(SITE, OTHER)
    yield "blocks exchanged", _exchange("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    yield "codes missing", lambda copy: copy.tensors.pop(copy.part(CODES))
    yield "scales missing", lambda copy: copy.tensors.pop(copy.part(SCALES))
    yield "codes cut to half", _part(CODES, lambda t: t[: len(t) // 2])


BYTES = ("fp8-dynamic", "fp8-block", "llm-int8", "w8a8-static", "smoothquant", "int8-split", "nvfp4", "mxfp4")


def of_zero_points() -> Iterator[tuple[str, Change]]:
    """Formats with zero points."""
    yield "zero points in reverse", _part(ZEROS, lambda t: t.flip(0).flip(1).contiguous())
    yield "zero points of zero", _part(ZEROS, torch.zeros_like)
    yield "one zero point turned over", _part(ZEROS, _bits(0x0C, (0, 0)))


def of_format(kind: str) -> Iterator[tuple[str, Change]]:
    """What only one format has: its quantization_config, and its own tensors."""
    yield from FORMATS.get(kind, lambda: iter(()))()


def _compressed_tensors(weights: dict[str, Any], others: dict[str, Change]) -> Iterator[tuple[str, Change]]:
    for key, value in weights.items():
        yield f"weights.{key} {value}", partial(_in_group, "weights", key, value)
    yield "ignore emptied", lambda copy: copy.quantization.update(ignore=[])
    yield "ignore names a quantized linear", lambda copy: copy.quantization["ignore"].append(SITE)
    yield "no quantization_config", lambda copy: copy.config.pop("quantization_config")
    yield "no config groups", lambda copy: copy.quantization.update(config_groups={})
    yield from others.items()


def _in_group(part: str, key: str, value: Any, copy: Copy) -> None:
    if key == "format":
        copy.quantization["format"] = copy.group["format"] = value
    else:
        copy.group[part][key] = value


def _ct_symmetric() -> Iterator[tuple[str, Change]]:
    yield from _compressed_tensors(
        {
            "num_bits": 8,
            "group_size": 64,
            "strategy": "channel",
            "symmetric": False,
            "type": "float",
            "actorder": "group",
        },
        {
            "format dense": partial(_in_group, "weights", "format", "dense"),
            "targets of attention only": lambda copy: copy.group.update(targets=["re:.*self_attn.*"]),
            "weight_shape of another": _part(("weight_shape",), lambda t: t * 2),
        },
    )


def _ct_asymmetric() -> Iterator[tuple[str, Change]]:
    yield from _compressed_tensors({"symmetric": True, "group_size": 16}, {})


def _fp8() -> Iterator[tuple[str, Change]]:
    yield from _compressed_tensors({"type": "int", "strategy": "tensor"}, {
        "inputs not quantized": lambda copy: copy.group.update(input_activations=None),
        "inputs static": partial(_in_group, "input_activations", "dynamic", False),
        "inputs per tensor": partial(_in_group, "input_activations", "strategy", "tensor"),
        "one code NaN": _part(("weight",), _bits_to(0x7F)),
    })  # fmt: skip


def _bits_to(value: int) -> Edit:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8)
        raw[3, 2] = value
        return raw.view(tensor.dtype)

    return change


def _nvfp4() -> Iterator[tuple[str, Change]]:
    whole = ("weight_global_scale",)
    yield "global scale x4", _part(whole, lambda t: t * 4)
    yield "global scale inverted", _part(whole, lambda t: 1 / t)
    yield "global scale 0", _part(whole, lambda t: t * 0)
    yield "global scale negative", _part(whole, lambda t: -t)
    yield from _compressed_tensors({"group_size": 32}, {})


def _static() -> Iterator[tuple[str, Change]]:
    inputs = ("input_scale",)
    yield "input scale 0", _part(inputs, lambda t: t * 0)
    yield "input scale negative", _part(inputs, lambda t: -t)
    yield "input scale x100", _part(inputs, lambda t: t * 100)
    yield "input scales exchanged", _swap(f"{SITE}.input_scale", "model.layers.1.self_attn.o_proj.input_scale")
    yield "input scale missing", lambda copy: copy.tensors.pop(f"{SITE}.input_scale")
    yield from _compressed_tensors({}, {
        "inputs dynamic": partial(_in_group, "input_activations", "dynamic", True),
        "inputs not quantized": lambda copy: copy.group.update(input_activations=None),
        "inputs of 4 bits": partial(_in_group, "input_activations", "num_bits", 4),
    })  # fmt: skip


def _cache() -> Iterator[tuple[str, Change]]:
    key, value = "model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"
    yield "k_scale 0", _tensor(key, torch.zeros_like)
    yield "k_scale negative", _tensor(key, torch.neg)
    yield "v_scale x1000", _tensor(value, lambda t: t * 1000)
    yield "k_scale and v_scale exchanged", _swap(key, value)
    yield "v_scale missing", lambda copy: copy.tensors.pop(value)
    yield "no cache in the config", lambda copy: copy.quantization.update(kv_cache_scheme=None)
    yield "cache of 4 bits", lambda copy: copy.quantization["kv_cache_scheme"].update(num_bits=4)


def _awq() -> Iterator[tuple[str, Change]]:
    for key, value in {"group_size": 64, "bits": 8, "version": "gemv", "zero_point": False}.items():
        yield f"{key} {value}", lambda copy, key=key, value=value: copy.quantization.update({key: value})
    yield "a quantized linear not to convert", lambda copy: copy.quantization["modules_to_not_convert"].append(SITE)


def _gptq(settings: dict[str, Any]) -> Iterator[tuple[str, Change]]:
    for key, value in settings.items():
        yield f"{key} {value}", lambda copy, key=key, value=value: copy.quantization.update({key: value})
    yield "g_idx beyond the groups", _part(("g_idx",), lambda t: t + 1)
    yield "g_idx in reverse", _part(("g_idx",), lambda t: t.flip(0))
    yield "g_idx of zeros", _part(("g_idx",), torch.zeros_like)


def _bitsandbytes() -> Iterator[tuple[str, Change]]:
    for key, value in {"llm_int8_threshold": 0.0, "load_in_8bit": False, "llm_int8_skip_modules": []}.items():
        yield f"{key} {value}", lambda copy, key=key, value=value: copy.quantization.update({key: value})
    yield "weight_format 1", _part(("weight_format",), lambda t: t + 1)


def _split() -> Iterator[tuple[str, Change]]:
    yield "outlier columns shifted", _part(("outlier_columns",), lambda t: (t + 1) % 200)
    yield "outlier weights of zero", _part(("outlier_weight",), torch.zeros_like)
    yield "format of another", lambda copy: copy.quantization.update(format="other")


FORMATS: dict[str, Callable[[], Iterator[tuple[str, Change]]]] = {
    "compressed-tensors": _ct_symmetric,
    "compressed-tensors-asymmetric": _ct_asymmetric,
    "awq": _awq,
    "gptq": partial(
        _gptq, {"group_size": 64, "bits": 8, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    ),
    "gptq-asymmetric": partial(_gptq, {"sym": True, "checkpoint_format": "gptq_v2", "bits": 2}),
    "gptq-v2": partial(_gptq, {"checkpoint_format": "gptq"}),
    "fp8-dynamic": _fp8,
    "nvfp4": _nvfp4,
    "w8a8-static": _static,
    "kv-fp8": _cache,
    "llm-int8": _bitsandbytes,
    "int8-split": _split,
}


EXPERT, OF_OTHER_BLOCK = "model.layers.0.mlp.experts.0", "model.layers.1.mlp.experts.0"
ROUTER, OTHER_ROUTER = "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"


def _experts_exchanged(one: str, other: str) -> Change:
    def apply(copy: Copy) -> None:
        for part in ("gate_proj", "up_proj", "down_proj"):
            _exchange(f"{one}.{part}", f"{other}.{part}")(copy)

    return apply


def of_mixture() -> Iterator[tuple[str, Change]]:
    """Experts, their routers, and what the config says of them."""
    down = f"{EXPERT}.down_proj"
    yield "two experts exchanged", _experts_exchanged(EXPERT, "model.layers.0.mlp.experts.1")
    yield "experts of two blocks exchanged", _experts_exchanged(EXPERT, OF_OTHER_BLOCK)
    yield "gate and up of an expert exchanged", _exchange(f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj")
    yield "down of two experts exchanged", _exchange(down, "model.layers.0.mlp.experts.2.down_proj")
    yield "an expert's scales x2", _part(SCALES, _times(2), down)
    yield "an expert's scales of zero", _part(SCALES, _times(0), down)
    yield "an expert's codes of zero", _part(CODES, torch.zeros_like, down)
    yield "an expert's rows in reverse", _part(CODES, _flipped, down)
    yield "an expert's codes missing", lambda copy: copy.tensors.pop(copy.part(CODES, down))
    yield (
        "an expert too many",
        lambda copy: copy.tensors.update(
            {n.replace("experts.0", "experts.4"): copy.tensors[n].clone() for n in list(copy.tensors) if EXPERT in n}
        ),
    )
    yield "a router's rows in reverse", _tensor(ROUTER, lambda t: t.flip(0).contiguous())
    yield "two rows of a router exchanged", _tensor(ROUTER, _swapped(0, 0, 1))
    yield "a router negative", _tensor(ROUTER, torch.neg)
    yield "a router of zeros", _tensor(ROUTER, torch.zeros_like)
    yield "a router x4", _tensor(ROUTER, lambda t: t * 4)
    yield "routers of two blocks exchanged", _swap(ROUTER, OTHER_ROUTER)
    yield "a router missing", lambda copy: copy.tensors.pop(ROUTER)
    yield "a token takes one expert", _set(("num_experts_per_tok",), 1)
    yield "a token takes more experts than there are", _set(("num_experts_per_tok",), 5)
    yield "three experts", _set(("num_local_experts",), 3)
    yield "shares that do not add up to one", _set(("norm_topk_prob",), False)
    yield "experts of half the width", _set(("moe_intermediate_size",), 64)
    yield "a block said to be dense", _set(("mlp_only_layers",), [1])


def of_gguf() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Faults of a GGUF file, which is changed in place."""
    weight, other = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"
    yield "codes of zero", partial(_gguf_bytes, weight, lambda raw: raw.fill(0))
    yield "one superblock of zeros", partial(_gguf_bytes, weight, lambda raw: raw[:144].fill(0))
    yield "the unit of a superblock x256", partial(_gguf_half, weight, 0, 256.0)
    yield "the unit of a superblock negative", partial(_gguf_half, weight, 0, -1.0)
    yield "the unit of minima x16", partial(_gguf_half, weight, 2, 16.0)
    yield "the 6-bit scales of a superblock 0", partial(_gguf_bytes, weight, lambda raw: raw[4:16].fill(0))
    yield "the codes of a superblock turned over", partial(_gguf_bytes, weight, _inverted)
    yield "rows in reverse", partial(_gguf_bytes, weight, _gguf_reverse)
    yield "norm of zeros", partial(_gguf_bytes, "blk.0.attn_norm.weight", lambda raw: raw.fill(0))
    yield "final norm negative", partial(_gguf_bytes, "output_norm.weight", _signs)
    yield "embedding of zeros", partial(_gguf_bytes, "token_embd.weight", lambda raw: raw.fill(0))
    yield "a row of the embedding", partial(_gguf_bytes, "token_embd.weight", lambda raw: raw[512:1024].fill(0))
    yield "head cut short of values", partial(_gguf_bytes, "output.weight", lambda raw: raw[:2048].fill(0))
    yield "two linears exchanged", partial(_gguf_exchange, weight, other)
    yield "rope.freq_base x50", partial(_gguf_float, "llama.rope.freq_base", 500000.0)
    yield "eps 1e-2", partial(_gguf_float, "llama.attention.layer_norm_rms_epsilon", 1e-2)
    yield "another eos", partial(_gguf_int, "tokenizer.ggml.eos_token_id", 5)
    yield "context length x4", partial(_gguf_int, "llama.context_length", 2048)
    yield "a token changed", partial(_gguf_text, b"</s>", b"<|s>")
    yield "file cut off", lambda path: path.write_bytes(path.read_bytes()[:-100])


def _gguf_place(path: Path, name: str) -> tuple[int, int]:
    from outlierq.load.gguf.blocks import stored_tensors

    stored = stored_tensors(path)[name]
    return stored.start, stored.info.nbytes


def _gguf_bytes(name: str, change: Callable[[Any], Any], path: Path) -> None:
    import numpy as np

    start, size = _gguf_place(path, name)
    raw = np.fromfile(path, np.uint8)
    change(raw[start : start + size])
    raw.tofile(path)


def _inverted(raw: Any) -> None:
    raw[16:144] ^= 0xFF


def _signs(raw: Any) -> None:
    raw.view("<u4")[:] ^= 0x80000000


def _gguf_reverse(raw: Any) -> None:
    raw[:] = raw.reshape(512, -1)[::-1].reshape(-1).copy()


def _gguf_half(name: str, offset: int, factor: float, path: Path) -> None:
    def change(raw: Any) -> None:
        raw[offset : offset + 2].view("<f2")[:] *= factor

    _gguf_bytes(name, change, path)


def _gguf_exchange(one: str, other: str, path: Path) -> None:
    (first, size), (second, _) = _gguf_place(path, one), _gguf_place(path, other)
    raw = bytearray(path.read_bytes())
    raw[first : first + size], raw[second : second + size] = raw[second : second + size], raw[first : first + size]
    path.write_bytes(raw)


def _gguf_value(path: Path, key: str, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    start = raw.index(key.encode()) + len(key) + 4
    raw[start : start + 4] = value
    path.write_bytes(raw)


def _gguf_float(key: str, value: float, path: Path) -> None:
    import struct

    _gguf_value(path, key, struct.pack("<f", value))


def _gguf_int(key: str, value: int, path: Path) -> None:
    _gguf_value(path, key, value.to_bytes(4, "little"))


def _gguf_text(old: bytes, new: bytes, path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))
