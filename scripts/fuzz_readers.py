"""What is fuzzed: for each reader a few valid files, how they are changed, and how a file is read.

`read` gets a folder that holds the changed file beside whatever else the reader needs, and does with it what a user's
command would do. It may raise `OutlierqError`; anything else is a finding.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fuzz_mutate as mutate
from fuzz_sources import CASES, state_bytes

Folder = Path


def nothing(_folder: Folder) -> None:
    """No other files are needed."""


@dataclass(frozen=True)
class Reader:
    """file: name of the file that is changed. seeds: valid ones. prepare: writes what lies beside it, once.

    read: reads the folder. written: how a changed seed becomes the file, where a case is not the file itself.
    """

    file: str
    seeds: Callable[[], list[bytes]]
    change: mutate.Mutator
    read: Callable[[Folder], Any]
    prepare: Callable[[Folder], None] = nothing
    written: Callable[[Folder, bytes], None] | None = None

    def put(self, folder: Folder, case: bytes) -> None:
        """Write a case into the folder."""
        if self.written is not None:
            self.written(folder, case)
        else:
            (folder / self.file).write_bytes(case)


def dump(value: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":")).encode()


# ------------------------------------------------------------------------------------------------ safetensors, folders

WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1}


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A valid file of (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    text = dump(header)
    return len(text).to_bytes(8, "little") + text + b"".join(raw for _, _, raw in tensors.values())


def filled(dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    """A tensor of small numbers."""
    count = WIDTHS[dtype]
    for size in shape:
        count *= size
    return dtype, list(shape), bytes(i % 7 for i in range(count))


def safetensors_seeds() -> list[bytes]:
    """Several dtypes, an empty tensor, a scalar."""
    return [
        safetensors({"a.weight": filled("BF16", 4, 8), "b": filled("F32", 3), "empty": filled("F32", 0, 5)}),
        safetensors({"scalar": filled("I64"), "x": filled("I8", 2, 2, 2), "y": filled("F8_E4M3", 4)}),
        safetensors({}),
    ]


def read_safetensors(folder: Folder) -> None:
    """Header, every tensor, rows of matrices, and the samples that the fingerprint takes."""
    from outlierq.load.source.shards import read_header, read_rows, read_stored, sample

    stored = read_header(folder / "model.safetensors")
    for _ in read_stored(stored, stored):
        pass
    for tensor in stored.values():
        if tensor.info.shape:
            for _ in read_rows(tensor, 2):
                pass
    for _ in sample(((t.info.name, t.path, t.start, t.info.nbytes) for t in stored.values()), 4096):
        pass


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2], "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}  # fmt: skip
PLAIN = {"model.embed_tokens.weight": ("BF16", 16, 8), "model.norm.weight": ("BF16", 8)} | {
    f"model.layers.0.{name}": ("BF16", *shape)
    for name, shape in {
        "self_attn.q_proj.weight": (8, 8), "self_attn.k_proj.weight": (4, 8), "self_attn.v_proj.weight": (4, 8),
        "self_attn.o_proj.weight": (8, 8), "mlp.gate_proj.weight": (12, 8), "mlp.up_proj.weight": (12, 8),
        "mlp.down_proj.weight": (8, 12), "input_layernorm.weight": (8,), "post_attention_layernorm.weight": (8,),
    }.items()
}  # fmt: skip


def plain_tensors() -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a Llama of one block."""
    return {name: filled(*form) for name, form in PLAIN.items()}


def open_folder(folder: Folder) -> Any:
    """The checkpoint, with all that is lazy in it asked for."""
    from outlierq.load import open_checkpoint, unpacked

    checkpoint = open_checkpoint(str(folder))
    _ = checkpoint.fingerprint, [file.name for file in checkpoint.files]
    return unpacked(checkpoint)


def config_folder(folder: Folder) -> None:
    """A folder that lacks its config.json."""
    (folder / "model.safetensors").write_bytes(safetensors(plain_tensors()))


def config_seeds() -> list[bytes]:
    """A plain config, and ones that say they bring code or a text model."""
    return [
        dump(CONFIG),
        dump({**CONFIG, "model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}),
        dump({"model_type": "gemma3", "text_config": CONFIG, "dtype": "float16"}),
    ]


def read_config(folder: Folder) -> None:
    """Open the folder and let transformers check its config."""
    from outlierq.load.model.skeleton import skeleton_config

    skeleton_config(open_folder(folder))


def read_skeleton(folder: Folder) -> None:
    """Build the model of the config on the meta device and find its parts."""
    from outlierq.load import build_skeleton, find_structure

    checkpoint = open_folder(folder)
    find_structure(checkpoint, build_skeleton(checkpoint))


WIDE_CONFIG = CONFIG | {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "rope_theta": 5e5} | {
    "rope_scaling": {
        "rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip


def plan_seeds() -> list[bytes]:
    """A model as wide as a group of GGUF, with two ways to scale its rotary embedding."""
    return [dump(WIDE_CONFIG), dump(WIDE_CONFIG | {"rope_scaling": CONFIG["rope_scaling"]})]


def plan_folder(folder: Folder) -> None:
    """Weights, and a tokenizer that GGUF files can hold."""
    square = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), (32, 32))
    shapes = square | dict.fromkeys(("k_proj", "v_proj"), (16, 32)) | {"embed_tokens": (16, 32)}
    tensors = {
        name: ("BF16", shape, bytes(2 * prod(shape)))
        for name in PLAIN
        for shape in [list(shapes.get(name.split(".")[-2], (32,)))]
    }
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    (folder / "tokenizer.json").write_bytes(byte_vocabulary_seeds()[0])


def read_plan(folder: Folder) -> None:
    """Plans for two formats; GGUF writes the config's numbers into its header."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.recipe import load

    checkpoint = open_checkpoint(str(folder))
    for form in ("gguf", "compressed-tensors"):
        make_plan(checkpoint, load("rtn-w8", [f"export.format={form}", "quantize.group_size=32"]))


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index_folder(folder: Folder) -> None:
    """Two shards, and everything that an index should not lead to: links out, a loop, a pipe, a folder, a pickle."""
    (folder / "config.json").write_bytes(dump(CONFIG))
    tensors = plain_tensors()
    names = list(tensors)
    for shard, members in zip(SHARDS, (names[:5], names[5:]), strict=True):
        (folder / shard).write_bytes(safetensors({name: tensors[name] for name in members}))
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    outside.write_bytes(safetensors({"secret": filled("F32", 2)}))
    (folder / "outside.safetensors").symlink_to(outside)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "weights.bin").write_bytes(b"")


def index_seeds() -> list[bytes]:
    """A valid index."""
    names = list(PLAIN)
    weight_map = {name: SHARDS[names.index(name) >= 5] for name in names}
    return [dump({"metadata": {"total_size": 1}, "weight_map": weight_map})]


# ------------------------------------------------------------------------------------------------- packed checkpoints


def packed_case(quantization: dict[str, Any], tensors: dict[str, tuple]) -> bytes:
    """A case: the quantization_config, and dtype and shape of the tensors."""
    return dump({"quantization_config": quantization, "tensors": {n: [d, s] for n, (d, *s) in tensors.items()}})


def packed_seeds() -> list[bytes]:
    """One of each format that is decoded."""
    module = "model.layers.0.mlp.up_proj"
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["re:.*up_proj", "Linear"], "weights": weights, "format": "pack-quantized"}
    tensors = {"weight_packed": ("I32", 8, 2), "weight_scale": ("BF16", 8, 2), "weight_shape": ("I64", 2)}
    tensors |= {"weight_zero_point": ("I32", 1, 2)}
    bytewise = {**group, "weights": {**weights, "num_bits": 8, "symmetric": True, "strategy": "channel"}}
    float8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [4, 4]}
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    common = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    cases = [
        ({**common, "format": "pack-quantized", "config_groups": {"group_0": group}}, tensors),
        (
            {**common, "config_groups": {"a": {**bytewise, "format": "int-quantized", "input_activations": inputs}}},
            {"weight": ("I8", 8, 8), "weight_scale": ("F32", 8, 1)},
        ),
        (
            {**common, "format": "float-quantized", "config_groups": {"a": {"targets": ["Linear"], "weights": float8}},
             "kv_cache_scheme": cache},
            {"weight": ("F8_E4M3", 8, 8), "weight_scale": ("F32", 2, 2), "k_scale": ("F32", 1), "v_scale": ("F32", 1)},
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False,
             "checkpoint_format": "gptq", "dynamic": {"-:.*down.*": {}, "+:.*up.*": {"bits": 4}}},
            {"qweight": ("I32", 2, 16), "qzeros": ("I32", 2, 2), "scales": ("F16", 2, 16), "g_idx": ("I32", 16)},
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True},
            {"qweight": ("I32", 16, 2), "qzeros": ("I32", 2, 2), "scales": ("F16", 2, 16)},
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
            {"weight": ("I8", 8, 8), "SCB": ("F32", 8), "weight_format": ("U8",)},
        ),
        (
            {"quant_method": "outlierq", "format": "outlierq-split"},
            {"weight": ("I8", 8, 8), "weight_scale": ("F32", 8, 1), "outlier_columns": ("I64", 0),
             "outlier_weight": ("BF16", 8, 0)},
        ),
        (
            {"quant_method": "outlierq-olive", "bits": 4},
            {"weight_pairs": ("U8", 8, 8), "weight_scale": ("BF16", 8, 1)},
        ),
    ]  # fmt: skip
    return [packed_case(config, {f"{module}.{role}": form for role, form in parts.items()}) for config, parts in cases]


# What a valid tensor holds whose numbers mean something; others hold any.
CONTENT: dict[str, Callable[[bytes], bytes]] = {
    "weight_shape": lambda raw: ((8).to_bytes(8, "little") + (16).to_bytes(8, "little") + raw)[: len(raw)],
    "g_idx": lambda raw: b"".join((i // 8).to_bytes(4, "little") for i in range(len(raw) // 4)),
    "outlier_columns": lambda raw: b"".join(i.to_bytes(8, "little") for i in range(len(raw) // 8)),
    "weight_format": lambda raw: bytes(len(raw)),
    "bitsandbytes__nf4": state_bytes,
    "bitsandbytes__fp4": lambda raw: state_bytes(raw).replace(b"nf4", b"fp4"),
}


def write_packed(folder: Folder, case: bytes) -> None:
    """config.json and model.safetensors of a case; what makes no file is left out."""
    try:
        said = json.loads(case)
    except (ValueError, RecursionError):
        said = {}
    said = said if isinstance(said, dict) else {}
    (folder / "config.json").write_bytes(dump({**CONFIG, "quantization_config": said.get("quantization_config")}))
    tensors = {"model.norm.weight": filled("BF16", 8)}
    forms = said.get("tensors")
    for name, form in forms.items() if isinstance(forms, dict) else ():
        shape = form[1] if isinstance(form, list) and len(form) == 2 and isinstance(form[1], list) else None
        if (
            shape is not None
            and str(form[0]) in WIDTHS
            and all(type(n) is int and 0 <= n <= 300 for n in shape)
            and prod(shape) <= 1 << 22
        ):
            dtype, sizes, raw = filled(str(form[0]), *shape[:4])
            tensors[name] = (dtype, sizes, CONTENT.get(name.rpartition(".")[2], lambda raw: raw)(raw))
    (folder / "model.safetensors").write_bytes(safetensors(tensors))


def source_seeds() -> list[bytes]:
    """One of each method by which sources are published that is only decoded."""
    return [packed_case(config, tensors) for config, tensors in CASES]


def read_source(folder: Folder) -> None:
    """What a compressed source serves: its scales checked, every weight decoded."""
    from outlierq.load import open_checkpoint, served

    checkpoint = served(open_checkpoint(str(folder)))
    original = getattr(checkpoint, "original", None)
    for name in checkpoint.packed:
        if hasattr(original, "original") and hasattr(original.original, "check_scales"):
            original.original.check_scales(name)
        elif hasattr(original, "check_scales"):
            original.check_scales(name)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def read_packed(folder: Folder) -> None:
    """Decode every weight."""
    checkpoint = open_folder(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    from outlierq.core.errors import OutlierqError

    for name in getattr(checkpoint, "linears", {}) if hasattr(checkpoint, "quantized") else ():
        with suppress(OutlierqError):  # groups in activation order cannot be told as codes
            checkpoint.quantized(name)


# --------------------------------------------------------------------------------------------------------------- GGUF


def gguf_seeds() -> list[bytes]:
    """A Llama of one block, described; with a vocabulary."""
    llama = {
        "context_length": 32, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16, "vocab_size": 16,
    }  # fmt: skip
    fields: list[Any] = [["general.architecture", 8, "llama"], ["general.name", 8, "tiny"]]
    fields += [[f"llama.{key}", 4, value] for key, value in llama.items()]
    fields += [
        ["llama.attention.layer_norm_rms_epsilon", 6, 1e-5],
        ["llama.rope.freq_base", 6, 10000.0],
        ["tokenizer.ggml.tokens", 9, [8, [f"t{i}" for i in range(16)]]],
        ["tokenizer.ggml.token_type", 9, [5, [1] * 16]],
        ["general.alignment", 4, 32],
        ["general.quantized", 7, True],
    ]
    shapes = {
        "token_embd.weight": [32, 16], "output_norm.weight": [32], "blk.0.attn_norm.weight": [32],
        "blk.0.attn_q.weight": [32, 32], "blk.0.attn_k.weight": [32, 16], "blk.0.attn_v.weight": [32, 16],
        "blk.0.attn_output.weight": [32, 32], "blk.0.ffn_norm.weight": [32], "blk.0.ffn_gate.weight": [32, 32],
        "blk.0.ffn_up.weight": [32, 32], "blk.0.ffn_down.weight": [32, 32],
    }  # fmt: skip
    tensors, offset = [], 0
    for name, dims in shapes.items():
        kind = 8 if len(dims) > 1 else 0  # Q8_0 and F32
        tensors.append([name, dims, kind, offset])
        offset += (dims[1] * 34 if len(dims) > 1 else dims[0] * 4) + 31 & ~31
    return [dump({"version": 3, "fields": fields, "tensors": tensors, "body": offset})]


def gguf_header_seeds() -> list[bytes]:
    """Two tensors and a field of each kind: small, since gguf's reader takes its time."""
    fields: list[Any] = [
        ["general.architecture", 8, "llama"], ["llama.block_count", 4, 1], ["llama.rope.freq_base", 6, 10000.0],
        ["tokenizer.ggml.tokens", 9, [8, ["a", "b"]]], ["tokenizer.ggml.scores", 9, [6, [0.5, 1.0]]],
        ["general.alignment", 4, 32], ["split.count", 2, 1],
    ]  # fmt: skip
    tensors = [["blk.0.attn_q.weight", [32, 2], 8, 0], ["output_norm.weight", [8], 0, 96]]
    return [dump({"version": 3, "fields": fields, "tensors": tensors, "body": 128})]


def read_gguf_headers(folder: Folder) -> None:
    """Headers, and the values of every tensor."""
    import torch

    from outlierq.load.gguf.file import dequantized
    from outlierq.load.gguf.split import read_gguf

    header = read_gguf(folder / "model.gguf")
    for tensor in header.tensors.values():
        dequantized(tensor, torch.bfloat16)


def block_seeds() -> list[bytes]:
    """Of each type of block its number, then two rows of one block each."""
    from outlierq.core.gguf.types import block_types

    kinds = enumerate(block_types().values())
    return [bytes([number, *(place % 200 for place in range(2 * kind.nbytes))]) for number, kind in kinds]


def read_blocks(folder: Folder) -> None:
    """Codes and scales of two rows of a type, which stand for what the package gguf reads."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from outlierq.core.gguf.types import block_types
    from outlierq.core.scheme import gguf_scheme
    from outlierq.load import decode_rows

    case = (folder / "blocks.bin").read_bytes()
    kind = list(block_types().values())[(case[0] if case else 0) % len(block_types())]
    width = len(case[1:]) // 2
    raw = np.frombuffer(case[1 : 1 + 2 * width], np.uint8).reshape(2, width).copy()
    if kind.name == "MXFP4":
        raw[:, :1] &= 0x7F  # the largest exponents stand for no float32
    if kind.name == "NVFP4":
        raw[:, :4] &= 0x7E  # nor does the largest of these, and they have no sign
    parts = {"weight": torch.from_numpy(raw), "heads": torch.tensor(0)}
    parts |= {"scale": torch.ones(1)} if kind.name == "NVFP4" else {}
    with np.errstate(all="ignore"):
        read = decode_rows("gguf", parts, gguf_scheme(kind.name), (2, kind.columns), 0, 2).dequantize().numpy()
        theirs = dequantize(raw, GGMLQuantizationType[kind.name])
    finite = np.isfinite(theirs)
    assert np.array_equal(read[finite], theirs[finite]), f"{kind.name} is read in another way than gguf does"


def weight_seeds() -> list[bytes]:
    """Of each type its number, whether scales are searched, then two rows of one block in bfloat16."""
    import torch

    from outlierq.core.gguf.types import block_types

    cases = []
    for number, kind in enumerate(block_types().values()):
        rows = torch.randn(2, kind.columns, generator=torch.Generator().manual_seed(number)).bfloat16() / 16
        cases += [bytes([number, by]) + bytes(rows.view(torch.uint8).flatten().tolist()) for by in (0, 1)]
    return cases


def write_weights(folder: Folder) -> None:
    """Any weights on the grid of any type: gguf must read from the written blocks what was meant."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    from outlierq.core.gguf.types import block_types
    from outlierq.core.model import LinearSite
    from outlierq.core.scheme import gguf_scheme
    from outlierq.export.gguf.blocks import encode_blocks
    from outlierq.quantize.stage import quantize_rows
    from outlierq.registry import method

    case = (folder / "weights.bin").read_bytes().ljust(2, b"\0")
    kind = list(block_types().values())[case[0] % len(block_types())]
    raw = case[2 : 2 + 4 * kind.columns].ljust(4 * kind.columns, b"\0")
    rows = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(2, kind.columns)
    site = LinearSite("a", "a.weight", None, 2, kind.columns, 0)
    options = {"scale_search": "mse" if case[1] % 2 else "minmax"}
    for quantized in quantize_rows(site, [rows], gguf_scheme(kind.name), method("quantize", "rtn"), options):
        blocks, meant = encode_blocks(site, quantized).numpy(), quantized.dequantize().numpy()
        with np.errstate(all="ignore"):
            read = dequantize(blocks, GGMLQuantizationType[kind.name])
        if kind.name == "NVFP4":  # a number beside the matrix
            read = read / quantized.super_scale.numpy()
        assert np.array_equal(read, meant), f"{kind.name} is written in another way than gguf reads it"


def option_seeds() -> list[bytes]:
    """What a recipe says of types, mixes, embeddings and single tensors."""
    end = b"\nexport: {format: gguf}\n"
    return [
        b"quantize:\n  method: rtn\n  type: Q4_K\n  embeddings: Q6_K\n  ignore: []" + end,
        b"quantize:\n  method: rtn\n  mix: Q4_K_M\n  scale_search: mse\n  ignore: []" + end,
        b"quantize:\n  method: rtn\n  type: IQ4_NL\n  overrides:\n    - {match: '*q_proj', type: Q5_0}\n"
        b"    - {match: '*.down_proj', keep: true}" + end,
    ]


def change_options(seed: bytes, rng: Any) -> bytes:
    """Mostly a name of a type or mix in place of a value; else what becomes of any recipe."""
    if rng.random() < 0.3:
        return mutate.yaml_file(seed, rng)
    from outlierq.core.gguf.mixes import mixes
    from outlierq.core.gguf.types import block_types

    names = [*block_types(), *mixes(), "null", "[]", "'*'", "['*_proj']", "mse", "minmax", "true", "4", "BF16"]
    lines = seed.decode().splitlines()
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(1, len(lines))
        start, colon, _ = lines[at].rpartition(": ")
        end = "}" if lines[at].endswith("}") else ""
        lines[at] = f"{start}{colon}{rng.choice(names)}{end}" if colon else lines[at]
    return "\n".join(lines).encode()


def options_folder(folder: Folder) -> None:
    """A file of one block."""
    (folder / "model.gguf").write_bytes(mutate.gguf_file(json.loads(gguf_seeds()[0])))


def plan_options(folder: Folder) -> None:
    """The plan of such a recipe for a file, with the size of the result."""
    from outlierq import recipe
    from outlierq.load import FramedCheckpoint
    from outlierq.pipeline.planning.decide import make_plan

    asked = recipe.parse(recipe.read(folder / "recipe.yaml"), name="recipe")
    if not asked.needs and not asked.transform:
        assert make_plan(FramedCheckpoint(folder / "model.gguf"), asked).output_bytes > 0


def imatrix_seeds() -> list[bytes]:
    """Two entries, one of a mixture."""
    fields: list[Any] = [
        ["general.type", 8, "imatrix"], ["imatrix.chunk_count", 4, 6], ["imatrix.chunk_size", 4, 32],
        ["imatrix.datasets", 9, [8, ["a.txt"]]],
    ]  # fmt: skip
    entries = {"blk.0.attn_q.weight": (16, 1), "blk.0.ffn_up_exps.weight": (8, 3)}
    tensors: list[Any] = []
    for name, (width, matrices) in entries.items():
        for part, dims in (("in_sum2", [width, matrices]), ("counts", [1, matrices])):
            tensors.append([f"{name}.{part}", dims, 0, 96 * len(tensors)])
    return [dump({"version": 3, "fields": fields, "tensors": tensors, "body": 96 * len(tensors)})]


def read_importance(folder: Folder) -> None:
    """An importance matrix."""
    from outlierq.load.gguf.imatrix import read_imatrix

    _ = read_imatrix(folder / "imatrix.gguf").description


def read_gguf(folder: Folder) -> None:
    """The whole checkpoint with its config, names and values."""
    from outlierq.load import open_checkpoint

    checkpoint = open_checkpoint(str(folder / "model.gguf"))
    _ = checkpoint.fingerprint
    for name in checkpoint.tensors:
        checkpoint.read(name)


# ----------------------------------------------------------------------------------------------------- recipes, reports


def recipe_seeds() -> list[bytes]:
    """Small recipes that use all sections."""
    return [
        b"calibration:\n  text: [{path: embedded, weight: 2.0}]\n  samples: 8\nquantize: {method: gptq, damp: 0.01}\n",
        b"quantize:\n  method: rtn\n  bits: 4\n  ignore: ['*h']\n  overrides:\n    - {match: '*down*', bits: 8}\n",
        b"quantize: {method: rtn, kind: float, bits: 8, group_size: channel}\nexport: {max_shard_size: 5GB}\n",
        b"gate:\n  max_kl: 0.1\n  min_task: ['mmlu:-1.0']\n  text: embedded\nexport: {format: dense}\n",
        b"calibration: {}\ntransform: [{method: awq, scaling: both}]\nquantize: {method: rtn}\nkv_cache: {}\n",
    ]


def read_recipe(folder: Folder) -> None:
    """Check the recipe, and ask it what a plan would ask."""
    from outlierq import recipe

    path = folder / "recipe.yaml"
    found = recipe.parse(recipe.read(path), name="recipe")
    _ = found.needs, found.fingerprint, found.scheme_for("model.layers.0.mlp.down_proj", "bfloat16")


def read_settings(folder: Folder) -> None:
    """The same for a value of --set."""
    from outlierq import recipe

    setting = (folder / "setting.txt").read_bytes().decode("utf-8", "replace")
    recipe.parse("quantize: {method: rtn, overrides: []}\n", settings=[setting])


def report_seeds() -> list[bytes]:
    """A small report of a run and one of outliers."""
    from outlierq.core.measured.outliers import (
        BlockOutliers,
        ChannelOutliers,
        GroupOutliers,
        MassiveEntry,
        OutlierReport,
    )
    from outlierq.core.report import Report, SiteRow

    run = Report(
        model="tiny", recipe="gptq-w4", settings={"quantize": {"bits": 4}}, out="/tmp/out", fingerprint="ab" * 32,
        versions={"torch": "2.13.0"}, seeds={"calibration": 0}, machine={"device": "cpu"},
        rows=(SiteRow("m.up_proj", "gptq", 4, 128, True, 0.01, 0.09, 4.1, 1.5),), transforms=({"block": 0},),
        notes=("a note",), source_bytes=4000, output_bytes=1000, bits_per_weight=4.2, quantized_bits_per_weight=4.1,
        source_bits_per_weight=16.0, seconds={"quantize": 1.5}, evaluation={"divergence": {"kl_per_token": 0.01}},
    )  # fmt: skip
    group = GroupOutliers(
        "m.0.q_proj", 0, "q_proj", ("m.0.q_proj",), 100, (1.0, 9.0), (1,), (ChannelOutliers(1, 9.0, 9.0),),
        {"kurtosis": 5.0}, {"m.0.q_proj": {"alpha": 2.0}}, {"w8a8": 0.1}, "smoothquant", "dangerous", ("why",),
    )  # fmt: skip
    block = BlockOutliers(0, 1.5, {"sink_heads": 0.5}, (MassiveEntry(0, 0, 0, 1, "a", 1, 9.0, 9.0),))
    outliers = OutlierReport("tiny", "ab" * 32, "text", 1.0, (group,), (block,), {"1": (0.5, 0.5)}, (1,), ("calm",))
    return [dump(run.to_dict()), dump(outliers.to_dict())]


def read_report(folder: Folder) -> None:
    """The report beside a checkpoint, as `eval`, `publish` and `inspect` read it."""
    from outlierq.core.machine.untrusted import json_value
    from outlierq.core.measured.outliers import OutlierReport
    from outlierq.pipeline.measuring.measure import read_report
    from outlierq.pipeline.publish import without_paths

    raw = (folder / "outlierq.json").read_bytes()
    if b"outlier_report_version" in raw:
        OutlierReport.from_dict(json_value(raw, "outliers.json")).to_dict()
        return
    report = read_report(folder)
    without_paths(report.to_dict())
    _ = report.total_seconds


# ---------------------------------------------------------------------------------------------- statistics, journal


def stats_seeds() -> list[bytes]:
    """The list of a finished statistics folder of one block."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        write_stats(Path(scratch))
        return [(Path(scratch) / "stats.json").read_bytes()]


def write_stats(folder: Folder) -> None:
    """A finished statistics folder of one block."""
    import torch

    from outlierq.calibrate.stored.stats_file import StatsIdentity, StatsWriter
    from outlierq.core.measured.block_stats import BlockStats
    from outlierq.core.measured.logits import LogitSample
    from outlierq.core.model import Fold, InputGroup, LinearSite
    from outlierq.core.stats import InputStats

    k = 4
    site = LinearSite("m.0.up", "m.0.up.weight", None, 6, k, 0)
    group = InputGroup("m.0.up", (site,), Fold("norm", "m.0.norm.weight", None, tuple(range(k))), "")
    stats = InputStats(10, 2, min=-torch.ones(k), max=torch.ones(k), sum_x=torch.zeros(k, dtype=torch.float64),
                       hessian=torch.eye(k), rows=torch.ones(3, k).bfloat16(), first_rows=torch.ones(2, k))  # fmt: skip
    writer = StatsWriter(folder, StatsIdentity("ab" * 32, "cd" * 32, "2 x 5 tokens", {"needs": ["hessian"]}))
    writer.write(0, [group], {"m.0.up": stats}, BlockStats(residual_abs_max=torch.ones(k)), ["a note"])
    numbers = torch.zeros(2, dtype=torch.int32)
    writer.write_logits(LogitSample(numbers, numbers, numbers[:, None], torch.zeros(2, 1), torch.zeros(2)))
    writer.finish()


def read_stats(folder: Folder) -> None:
    """Everything that a command takes from a statistics folder."""
    from outlierq.calibrate.stored.stats_file import StatsReader

    reader = StatsReader(folder)
    reader.check(reader.identity.model_fingerprint)
    _ = reader.notes
    for index in reader.indices:
        _, stats = reader.block(index)
        for kept in stats.values():
            _ = kept.channels, kept.mean, kept.abs_max
            kept.weighing_sinks(4.0)
        reader.block_stats(index)
    reader.logits()


def stats_tensor_seeds() -> list[bytes]:
    """The file of one block."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        write_stats(Path(scratch))
        return [(Path(scratch) / "block-00000.safetensors").read_bytes()]


def write_stats_tensors(folder: Folder, case: bytes) -> None:
    """The file of the block, and its new hash in the list, so that it is believed."""
    listed = json.loads((folder / "stats.json").read_bytes())
    listed["blocks"][0]["sha256"] = hashlib.sha256(case).hexdigest()
    (folder / "stats.json").write_bytes(dump(listed))
    (folder / "block-00000.safetensors").write_bytes(case)


def journal_seeds() -> list[bytes]:
    """A journal with two finished units, of which one has read a weight, and another of several shards."""
    entry = {"xxh3_128": "00" * 16, "rows": [asdict_row()], "transforms": [], "notes": ["a note"]}
    about = {"source": "tiny", "recipe": "awq-w4", "units": ["block 0", "outside"], "shards": 1}
    first = {"identity": IDENTITY, "about": about, "files": ["model.safetensors", "config.json"], "stamps": {}}
    units = [{"unit": "block 0", **entry, "read": {"model.norm.weight": "00" * 16}}, {"unit": "outside", **entry}]
    lines = [first, *({**unit, "seconds": {"quantize": 1.5}} for unit in units), {"stamps": {"model": [1, 2]}}]
    shards = [{"identity": {**IDENTITY, "shards": 2}}, {"unit": "block 0", **entry}]
    return [b"\n".join(map(dump, each)) + b"\n" for each in (lines, shards)]


IDENTITY = {"source": "ab", "recipe": "cd", "outlierq": "0.1"}


def asdict_row() -> dict[str, Any]:
    """A row of a report."""
    from outlierq.core.report import SiteRow

    return asdict(SiteRow("m.up_proj", "gptq", 4, 128, True, 0.01, 0.09, 4.1, 1.5))


def source_beside(folder: Folder) -> None:
    """The checkpoint that a run in the folder compresses."""
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir()
    config_folder(source)
    (source / "config.json").write_bytes(dump(CONFIG))


def read_journal(folder: Folder) -> None:
    """A run goes on behind the journal, or looks at it; rows and notes become a report."""
    from outlierq.core.errors import OutlierqError
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.inspect import describe_unfinished
    from outlierq.pipeline.ledger.journal import JOURNAL, Journal, former_shards, listed_files

    raw = (folder / JOURNAL).read_bytes()
    listed_files(folder)
    describe_unfinished(folder)
    former_shards(folder)
    (folder / JOURNAL).write_bytes(raw)
    journal = Journal(folder, {**IDENTITY, "shards": 2} if b'"shards":2' in raw else IDENTITY)
    _ = journal.rows
    for entry in journal.entries.values():
        _ = entry["xxh3_128"], list(entry["transforms"]), list(entry["notes"])
    with suppress(OutlierqError):  # the digests of a seed are not those of the source
        journal.check_source(open_checkpoint(str(folder.with_name(f"{folder.name}-source"))))


def write_unfinished(folder: Folder) -> None:
    """A statistics folder whose list is not final."""
    from outlierq.calibrate.stored.stats_file import FINISHED, UNFINISHED

    write_stats(folder)
    (folder / FINISHED).rename(folder / UNFINISHED)


def read_unfinished(folder: Folder) -> None:
    """A calibration goes on behind the list, or looks at it."""
    from outlierq.calibrate.stored.stats_file import UNFINISHED, StatsIdentity, StatsWriter
    from outlierq.pipeline.inspect import describe_unfinished_stats

    raw = (folder / UNFINISHED).read_bytes()
    describe_unfinished_stats(folder)
    writer = StatsWriter(folder, StatsIdentity("ab" * 32, "cd" * 32, "2 x 5 tokens", {"needs": ["hessian"]}))
    _ = writer.done, writer.former_stamps, writer.read
    writer.finish()
    (folder / "stats.json").unlink()
    (folder / UNFINISHED).write_bytes(raw)


# ----------------------------------------------------------------------------------- marks in folders, what is kept


def pin_seeds() -> list[bytes]:
    """The pin of a stopped run that streams from the Hub."""
    return [dump({"repository": "a/b", "revision": None, "commit": "ab" * 20, "shards": list(SHARDS)})]


def read_pin(folder: Folder) -> None:
    """Whether the folder of shards is ours, which commit it began with, and what of it makes room."""
    from outlierq.core.errors import SourceError
    from outlierq.core.machine.own_files import remove_files
    from outlierq.load.hub.streamed import PIN, _pinned, _read_pin, _refuse_foreign, _shards_of

    for name in (SHARDS[0], NOTES):
        (folder / name).write_text(name)
    listed = _shards_of(_read_pin(folder / PIN))
    try:
        _refuse_foreign(folder)
        commit = _pinned(folder, "a/b", None)
    except SourceError:
        assert NOTES not in listed
        (folder / NOTES).unlink()
        _refuse_foreign(folder)
        commit = _pinned(folder, "a/b", None)
    assert commit is None or isinstance(commit, str), f"a commit of type {type(commit).__name__}"
    remove_files(folder, [*listed, PIN])


NOTES = "my-notes.txt"


def sign_seeds() -> list[bytes]:
    """What a demo says that it wrote."""
    return [dump(["config.json", "model.safetensors"])]


def write_signed(folder: Folder, case: bytes) -> None:
    """The sign and the two files of a demo."""
    from outlierq.pipeline.demo import SIGN

    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    (folder / SIGN).write_bytes(case)


def read_sign(folder: Folder) -> None:
    """Make room for a new demo where the folder is one of a former; what is in the way stays as it is."""
    from outlierq.core.errors import OutputError
    from outlierq.pipeline.demo import remove_former

    before = {path.name for path in folder.iterdir()}
    if not remove_former(folder):
        assert {path.name for path in folder.iterdir()} == before, "files of a folder in the way were removed"
        raise OutputError(f"{folder} is in the way")


def cache_in(folder: Folder) -> Any:
    """The folder is the cache."""
    return patch.dict(os.environ, {"OUTLIERQ_CACHE": str(folder)})


KEY = "ab" * 32


def kept_seeds() -> list[bytes]:
    """A measurement in the cache of results."""
    measured = {"divergence": {"kl_per_token": 0.01}, "tasks": [{"name": "mmlu", "value": 0.5}], "notes": ["a note"]}
    digest = hashlib.sha256(f"{KEY} {json.dumps(measured, sort_keys=True)}".encode()).hexdigest()
    return [dump({"digest": digest, "measured": measured})]


def write_kept(folder: Folder, case: bytes) -> None:
    """The entry, where it is looked for."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{KEY}.json").write_bytes(case)


def read_kept(folder: Folder) -> None:
    """A measurement is believed as it was written, or made again."""
    from outlierq.core.errors import SourceError
    from outlierq.pipeline.measuring.cache import recall

    with cache_in(folder):
        measured = recall(KEY)
    if measured is None:
        raise SourceError("it is measured again")
    assert measured == json.loads(kept_seeds()[0])["measured"], "another measurement than was written"


BLOB = hashlib.sha256(b"weights").hexdigest()


def blob_folder(folder: Folder) -> None:
    """A file of a Hub cache."""
    (folder / BLOB).write_bytes(b"weights")
    (folder / "checked").mkdir()


def blob_seeds() -> list[bytes]:
    """The note of a check: a path, an inode, a size and a time; no two folders have the same."""
    return [b"/home/alice/.cache/huggingface/hub/blobs/ab 1234 7 1700000000000000000"]


def write_blob_note(folder: Folder, case: bytes) -> None:
    """The note, where it is looked for."""
    (folder / "checked" / BLOB).write_bytes(case)


def read_blob_note(folder: Folder) -> None:
    """A file of the cache that was checked before, or not."""
    from outlierq.core.errors import SourceError
    from outlierq.load.hub.content import _known

    with cache_in(folder):
        if not _known(folder / BLOB):
            raise SourceError("it is read again")


# --------------------------------------------------------------------------------------- what travels with the weights


def carried_seeds() -> list[bytes]:
    """Settings of a tokenizer that brings code, and paths of the machine that wrote it."""
    auto = {"AutoTokenizer": ["tokenization_mine.Mine", None], "AutoProcessor": "other/repo--processing.Mine"}
    places = {"name_or_path": "/home/alice/model", "tokenizer_file": "/home/alice/tokenizer.json"}
    nested = {"processor": {"_name_or_path": "/home/alice", "tokens": [{"content": "<s>", "special": True}]}}
    return [dump({**SETTINGS, "auto_map": auto, **places, **nested})]


def carried_folder(folder: Folder) -> None:
    """A checkpoint with code, which brings its own, with two chat templates, and with files that stay behind."""
    source_files = {
        "config.json": dump(CONFIG), "model.safetensors": safetensors(plain_tensors()),
        "tokenization_mine.py": b"from .helper import x\nfrom . import other\n", "helper.py": b"import os\n",
        "chat_template.jinja": b"{{ messages }}", "additional_chat_templates/tools.jinja": b"{{ tools }}",
        "tokenizer.json": byte_vocabulary_seeds()[0], "trainer_state.json": b"{}", "optimizer.pt": b"",
    }  # fmt: skip
    (folder / "additional_chat_templates").mkdir()
    for name, content in source_files.items():
        (folder / name).write_bytes(content)


def change_carried(seed: bytes, rng: Any) -> bytes:
    """Almost any JSON may travel: its bytes are changed more often than those of other files."""
    return (mutate.bytes_of if rng.random() < 0.3 else mutate.json_file)(seed, rng)


def read_carried(folder: Folder) -> None:
    """Every file that a result takes over, what stays behind, and what the tokenizer is known by."""
    from outlierq.load.source.carried import left_behind
    from outlierq.load.source.tokenizer_files import tokenizer_digest

    checkpoint = open_folder(folder)
    for file in checkpoint.files:
        content = file.read()
        assert b"/home/alice" not in content or not file.name.endswith("config.json") or carries_place(content)
    left_behind(folder, ["model.safetensors"])
    tokenizer_digest(checkpoint)


def carries_place(content: bytes) -> bool:
    """Whether a path stands under a key that names no place: then it is part of the settings."""
    from outlierq.load.source.carried import PLACES

    return not any(f'"{place}":'.encode() in content for place in PLACES)


def template_seeds() -> list[bytes]:
    """A chat template with all that templates usually do."""
    return [
        b"{% if messages[0]['role'] == 'system' %}{% set m = messages[1:] %}{% else %}{% set m = messages %}{% endif %}"
        b"{% for message in m %}{% if loop.first and not tools is defined %}{{ bos_token }}{% endif %}"
        b"{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}{% endfor %}"
        b"{% macro f(x) %}{{ x | tojson }}{% endmacro %}{{ f(messages | length) }}"
        b"{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        b"{% for a in range(3) %}{{ messages[0].content[a:] ~ strftime_now('%Y') }}{% endfor %}",
    ]


def read_template(folder: Folder) -> None:
    """A chat in the template that a checkpoint carries."""
    from outlierq.calibrate.text import chats

    tokenizer = templated()
    tokenizer.chat_template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    chats.rendered(tokenizer, [{"role": "user", "content": "question"}, {"role": "assistant", "content": "yes"}], "x")


@lru_cache
def templated() -> Any:
    """A tokenizer of transformers, which renders templates as users have it done."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer.from_str(tokenizer_seeds()[0].decode())
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


# ------------------------------------------------------------------------------------------------- text and task data


class Characters:
    """A tokenizer whose tokens are characters."""

    bos_token_id, eos_token_id, all_special_ids = None, 0, (0,)
    chat_template = "yes"

    def __call__(self, texts: str | list[str], **_options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [ord(c) for c in texts]}
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def apply_chat_template(self, messages: list[Any], **_options: Any) -> str:
        """As templates do: each message is indexed by name."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        template = ImmutableSandboxedEnvironment().from_string("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        return template.render(messages=messages)


def read_text(folder: Folder, name: str, chat: bool = False) -> None:
    """Calibration windows of a file."""
    from outlierq.calibrate.text.windows import TextSource, token_windows

    source = TextSource(path=str(folder / name))
    token_windows(Characters(), [source], samples=2, sequence_length=4, seed=0, chat_template=chat)


def read_jsonl(folder: Folder) -> None:
    """As text and as chats."""
    try:
        read_text(folder, "text.jsonl")
    finally:
        read_text(folder, "text.jsonl", chat=True)


def jsonl_seeds() -> list[bytes]:
    """Rows of text and of chats, in several shapes."""
    chats = [{"messages": [{"role": "user", "content": f"question {i}"}], "text": f"row number {i}"} for i in range(4)]
    parts = [{"type": "text", "text": "question"}, {"type": "image", "url": "x"}]
    tools = [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    mixed = [
        {"text": "row", "conversations": [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]},
        {"text": "row", "instruction": "question", "input": "with this", "output": "answer", "system": "rules"},
        {"text": "row", "prompt": "question", "chosen": [{"role": "user", "content": "question"}], "rejected": []},
        {"text": "row", "messages": tools},
    ]
    return [b"\n".join(map(dump, rows)) + b"\n" for rows in (chats, mixed)]


def json_rows_seeds() -> list[bytes]:
    """An array of rows, an object of columns, and an array of texts."""
    rows = [{"id": i, "text": f"row number {i}"} for i in range(4)]
    columns = {"id": list(range(4)), "text": [f"row number {i}" for i in range(4)]}
    return [dump(rows), dump(columns), dump(["row one", "row two", "row three"])]


def table_seeds() -> list[bytes]:
    """A table of text with cells in quotes."""
    return [b'\xef\xbb\xbfid,text\r\n1,"row, ""one""\nand more"\r\n2,row two\r\n3,\r\n', b"text\none line\nanother\n"]


def packed_text_seeds() -> list[bytes]:
    """The same plain text as gzip writes it, in one piece and in two."""
    text = text_seeds()[0]
    return [gzip.compress(text, mtime=0), gzip.compress(text, mtime=0) + gzip.compress(text, 1, mtime=0)]


def text_seeds() -> list[bytes]:
    """Plain text."""
    return ["The sea is calm tonight. 漢字 é\n\nA second paragraph.\n".encode() * 2]


def parquet_seeds() -> list[bytes]:
    """A small table, plain and compressed."""
    import io

    import pyarrow
    import pyarrow.parquet

    seeds = []
    table = pyarrow.table({"text": ["a row of text", "another one", None], "n": [1, 2, 3]})
    for compression in ("none", "snappy"):
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, compression=compression)
        seeds.append(file.getvalue())
    return seeds


def read_task_rows(folder: Folder, name: str) -> None:
    """Rows of a task's local data, looked for as `eval --data-dir` does."""
    from outlierq.evaluate import task_data

    task_data._parse.cache_clear()
    found = task_data.find_local(folder.parent, folder.name, "history")
    for path in [] if found is None else found.files["test"]:
        for row in task_data._rows(path):
            row.get("subject")


def task_seeds() -> list[bytes]:
    """Rows as MMLU has them."""
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2, "subject": "history"} for i in range(3)]
    return [b"\n".join(map(dump, rows)) + b"\n"]


def task_json_seeds() -> list[bytes]:
    """The same as one list."""
    return [b"[" + task_seeds()[0].strip().replace(b"\n", b",") + b"]"]


def csv_seeds() -> list[bytes]:
    """The same as CSV."""
    return [b'question,answer,subject\n"what, then",1,history\nwho,0,history\n']


def tokenizer_seeds() -> list[bytes]:
    """A byte-pair tokenizer of a few tokens."""
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    return [
        dump(
            {"version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
             "added_tokens": [{"id": 0, "content": "<unk>", "single_word": False, "lstrip": False, "rstrip": False,
                               "normalized": False, "special": True}],
             "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
             "post_processor": None,
             "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
             "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": ["a b"]}}
        )
    ]  # fmt: skip


def tokenizer_folder(folder: Folder) -> None:
    """A checkpoint that lacks its tokenizer."""
    config_folder(folder)
    (folder / "config.json").write_bytes(dump(CONFIG))


def read_tokenizer(folder: Folder) -> None:
    """Texts of tokens, as reports show them."""
    from outlierq.load.token_text import token_texts

    token_texts(at(folder), [0, 1, 3, 2**31])


def at(folder: Folder) -> Any:
    """All that `token_texts` asks of a checkpoint."""
    from types import SimpleNamespace

    return SimpleNamespace(path=folder, source=str(folder), kind="huggingface")


# ------------------------------------------------------------------------------ tokenizers on their way into GGUF files

# 256 bytes and some pieces; the vocabulary of the model has more rows than the tokenizer has tokens.
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTE_PIECES, "\u2581", "a", "b", "ab", "\u2581a"]
GGUF_CONFIG = CONFIG | {"vocab_size": 280}
SPECIAL = ["<s>", "</s>", "<unk>"]
SETTINGS = {
    "bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True,
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True}, "264": {"content": "<tool>", "special": False}
    },
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}", "legacy": False,
}  # fmt: skip


def added_token(number: int, text: str) -> dict[str, Any]:
    """A special token as tokenizer.json describes it."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **plain, "special": True}


def byte_vocabulary_seeds() -> list[bytes]:
    """A tokenizer.json of bytes and merges, as GPT-2's."""
    model = {"type": "BPE", "unk_token": None, "vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": ["a b"]}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return [dump({"added_tokens": [added_token(3, "<s>")], "pre_tokenizer": pre, "model": model})]


def piece_vocabulary_seeds() -> list[bytes]:
    """A tokenizer.json of characters and bytes, as Llama 2's."""
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    model = {
        "type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, "vocab": vocab,
        "merges": [["a", "b"], ["\u2581", "a"]],
    }  # fmt: skip
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    after = {
        "type": "TemplateProcessing", "single": single, "pair": single,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    return [
        dump(
            {"added_tokens": [added_token(PIECES.index(text), text) for text in SPECIAL], "model": model,
             "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None, "post_processor": after}
        )
    ]  # fmt: skip


def piece_model_seeds() -> list[bytes]:
    """A tokenizer.model of the same pieces."""

    def varint(rest: int) -> bytes:
        return bytes([rest | 128]) + varint(rest >> 7) if rest > 127 else bytes([rest])

    def sized(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **dict.fromkeys(BYTE_PIECES, 6)}
    pieces = [
        sized(1, text.encode()) + b"\x15" + struct.pack("<f", -number) + bytes([24, kinds.get(text, 1)])
        for number, text in enumerate(PIECES)
    ]
    return [b"".join(sized(1, piece) for piece in pieces) + sized(2, bytes([24, 2])) + sized(3, bytes([32, 0]))]


def gguf_tokenizer_folder(folder: Folder) -> None:
    """Settings beside a tokenizer that is changed."""
    (folder / "tokenizer_config.json").write_bytes(dump(SETTINGS))


def gguf_settings_folder(folder: Folder) -> None:
    """A tokenizer beside settings that are changed."""
    (folder / "tokenizer.json").write_bytes(piece_vocabulary_seeds()[0])


def read_gguf_tokenizer(folder: Folder) -> None:
    """What an export to GGUF makes of the tokenizer."""
    from types import SimpleNamespace

    from outlierq.export.gguf.header import gguf_header

    files = [SimpleNamespace(name=path.name, read=path.read_bytes) for path in folder.iterdir()]
    gguf_header(
        SimpleNamespace(source=str(folder), config=GGUF_CONFIG, files=files),
        [("token_embd.weight", "F32", (280, 8), 8960)],
    )


# ------------------------------------------------------------------------------------------------------------ the rest


def card_seeds() -> list[bytes]:
    """A README with metadata."""
    return [b"---\nlicense: apache-2.0\ntags: [a, b]\nbase_model: x/y\n---\n# A model\n"]


def read_card(folder: Folder) -> None:
    """The metadata that a source's README carries into a model card."""
    from outlierq.report.model_card import source_metadata

    source_metadata(folder)


def change_card(seed: bytes, rng: Any) -> bytes:
    """The YAML between the fences."""
    _, head, rest = seed.split(b"---\n", 2)
    return b"---\n" + mutate.yaml_file(head, rng) + b"\n---\n" + rest


def change_setting(seed: bytes, rng: Any) -> bytes:
    """key=value."""
    key, _, _ = seed.partition(b"=")
    piece = rng.choice(mutate.YAML_PIECES).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        return mutate.bytes_of(seed, rng)
    return key + b"=" + (piece if rng.random() < 0.6 else mutate.json_text(mutate.value(rng), rng))


READERS: dict[str, Reader] = {
    "safetensors": Reader("model.safetensors", safetensors_seeds, mutate.safetensors_file, read_safetensors),
    "config": Reader("config.json", config_seeds, mutate.json_file, read_config, config_folder),
    "index": Reader("model.safetensors.index.json", index_seeds, mutate.json_file, open_folder, index_folder),
    "packed": Reader("case.json", packed_seeds, mutate.json_file, read_packed, written=write_packed),
    "source": Reader("case.json", source_seeds, mutate.json_file, read_source, written=write_packed),
    "gguf-header": Reader("model.gguf", gguf_header_seeds, mutate.gguf_from, read_gguf_headers),
    "gguf-imatrix": Reader("imatrix.gguf", imatrix_seeds, mutate.gguf_from, read_importance),
    "blocks": Reader("blocks.bin", block_seeds, mutate.bytes_of, read_blocks),
    "weights": Reader("weights.bin", weight_seeds, mutate.bytes_of, write_weights),
    "types": Reader("recipe.yaml", option_seeds, change_options, plan_options, options_folder),
    "recipe": Reader("recipe.yaml", recipe_seeds, mutate.yaml_file, read_recipe),
    "setting": Reader("setting.txt", lambda: [b"quantize.bits=4", b"gate.max_kl=0.1"], change_setting, read_settings),
    "report": Reader("outlierq.json", report_seeds, mutate.json_file, read_report),
    "stats": Reader("stats.json", stats_seeds, mutate.json_file, read_stats, write_stats),
    "stats-tensors": Reader(
        "block-00000.safetensors", stats_tensor_seeds, mutate.safetensors_file, read_stats, write_stats,
        write_stats_tensors,
    ),
    "stats-unfinished": Reader(
        "unfinished.json", stats_seeds, mutate.json_file, read_unfinished, write_unfinished
    ),
    "journal": Reader(".outlierq-journal.jsonl", journal_seeds, mutate.json_lines, read_journal, source_beside),
    "pin": Reader(".outlierq-shards.json", pin_seeds, mutate.json_file, read_pin),
    "sign": Reader(".outlierq-demo.json", sign_seeds, mutate.json_file, read_sign, written=write_signed),
    "kept-result": Reader("entry.json", kept_seeds, mutate.json_file, read_kept, written=write_kept),
    "checked-note": Reader("note", blob_seeds, mutate.bytes_of, read_blob_note, blob_folder, write_blob_note),
    "carried": Reader("tokenizer_config.json", carried_seeds, change_carried, read_carried, carried_folder),
    "template": Reader("chat_template.jinja", template_seeds, mutate.template_file, read_template),
    "text": Reader("text.txt", text_seeds, mutate.bytes_of, lambda folder: read_text(folder, "text.txt")),
    "text-jsonl": Reader("text.jsonl", jsonl_seeds, mutate.json_lines, read_jsonl),
    "text-json": Reader("text.json", json_rows_seeds, mutate.json_file, lambda f: read_text(f, "text.json")),
    "text-json-lines": Reader("text.json", jsonl_seeds, mutate.json_lines, lambda f: read_text(f, "text.json")),
    "text-csv": Reader("text.csv", table_seeds, mutate.bytes_of, lambda folder: read_text(folder, "text.csv")),
    "text-gz": Reader("text.txt.gz", packed_text_seeds, mutate.bytes_of, lambda f: read_text(f, "text.txt.gz")),
    "text-parquet": Reader(
        "text.parquet", parquet_seeds, mutate.bytes_of, lambda folder: read_text(folder, "text.parquet")
    ),
    "task-jsonl": Reader("test.jsonl", task_seeds, mutate.json_lines, lambda f: read_task_rows(f, "test.jsonl")),
    "task-json": Reader("test.json", task_json_seeds, mutate.json_file, lambda f: read_task_rows(f, "test.json")),
    "task-csv": Reader("test.csv", csv_seeds, mutate.bytes_of, lambda f: read_task_rows(f, "test.csv")),
    "task-parquet": Reader("test.parquet", parquet_seeds, mutate.bytes_of, lambda f: read_task_rows(f, "test.parquet")),
    "tokenizer": Reader("tokenizer.json", tokenizer_seeds, mutate.json_file, read_tokenizer, tokenizer_folder),
    "vocabulary-bytes": Reader(
        "tokenizer.json", byte_vocabulary_seeds, mutate.json_file, read_gguf_tokenizer, gguf_tokenizer_folder
    ),
    "vocabulary-pieces": Reader(
        "tokenizer.json", piece_vocabulary_seeds, mutate.json_file, read_gguf_tokenizer, gguf_tokenizer_folder
    ),
    "vocabulary-model": Reader(
        "tokenizer.model", piece_model_seeds, mutate.bytes_of, read_gguf_tokenizer, gguf_tokenizer_folder
    ),
    "vocabulary-settings": Reader(
        "tokenizer_config.json", lambda: [dump(SETTINGS)], mutate.json_file, read_gguf_tokenizer, gguf_settings_folder
    ),
    "card": Reader("README.md", card_seeds, change_card, read_card),
}  # fmt: skip
# A model is built for each of these inputs, so they are too slow for many.
SLOW: dict[str, Reader] = {
    "skeleton": Reader("config.json", config_seeds, mutate.json_file, read_skeleton, config_folder),
    "plan": Reader("config.json", plan_seeds, mutate.json_file, read_plan, plan_folder),
    "gguf": Reader("model.gguf", gguf_seeds, mutate.gguf_from, read_gguf),
}
