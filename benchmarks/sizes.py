"""What recipes make of three published shapes, to the byte, and the memory that it plans for; from headers alone.

    python benchmarks/sizes.py -o benchmarks/results/sizes.json

The weight files are sparse: they have their full length and a header, and hold nothing. docs/choose.md and
docs/time-and-memory.md show the figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import write_results

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # our tree, and not this folder, whose gguf.py would hide the package
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
    "head_dim": 128, "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256, "bos_token_id": 128000,
    "eos_token_id": 128001,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
    "Llama-3.1-70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
}  # fmt: skip
# The first is planned with the recipes whose loss is known; those of GGUF files need a tokenizer, which is not here.
RECIPES = (
    "rtn-w8", "rtn-w4", "gptq-w4", "awq-gptq-w4", "best-w4", "gptq-w3", "best-w3", "best-w2g64", "w8a8-dynamic",
    "smoothquant-w8a8", "fp8-dynamic", "fp8-block", "mxfp8", "w4afp8", "nvfp4", "mxfp4", "nvfp4-w4a4", "mxfp4-w4a4",
    "auto-nvfp4", "auto-mxfp4",
)  # fmt: skip
USUAL = ("fp8-dynamic", "gptq-w4")  # the others with these


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of everything in the published files."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        at = f"model.layers.{index}"
        for name, shape in {
            "q": (heads, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, heads),
        }.items():
            yield f"{at}.self_attn.{name}_proj.weight", shape
        experts = config.get("num_experts")
        if experts:
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
            yield f"{at}.mlp.gate.weight", (experts, hidden)
        parts = [f"{at}.mlp.experts.{number}" for number in range(experts)] if experts else [f"{at}.mlp"]
        width = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        for part in parts:
            yield f"{part}.gate_proj.weight", (width, hidden)
            yield f"{part}.up_proj.weight", (width, hidden)
            yield f"{part}.down_proj.weight", (hidden, width)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_sparse(folder: Path, config: dict[str, Any]) -> None:
    """The checkpoint, whose weights no disk holds."""
    header, end = {}, 0
    for name, shape in tensors(config):
        size = 2
        for each in shape:
            size *= each
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))


def row(folder: Path, recipe: str) -> dict[str, Any]:
    """Size, bits and memory of one plan; or why there is none."""
    import outlierq

    try:
        plan = outlierq.plan(folder, recipe)
    except outlierq.OutlierqError as error:
        return {"refused": str(error).splitlines()[0]}
    said = {"bytes": plan.output_bytes, "bits_per_weight": 8 * plan.output_bytes / (plan.source_bytes / 2)}
    return said | {"peak_bytes": plan.expected.peak_bytes, "least_ceiling_bytes": least_ceiling(folder, recipe)}


def least_ceiling(folder: Path, recipe: str) -> int | None:
    """The least `--max-memory` that `plan` accepts, in bytes: what the refusal of far too little says."""
    import outlierq

    try:
        outlierq.plan(folder, recipe, max_memory="1MiB")
    except outlierq.OutlierqError as error:
        said = re.search(r"--max-memory (\d+)MiB", error.hint or "")
        return int(said[1]) << 20 if said else None
    return None


def main() -> None:
    """Plan everything, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    out = parser.parse_args().out
    found: dict[str, Any] = {}
    for number, (name, config) in enumerate(SHAPES.items()):
        with tempfile.TemporaryDirectory() as place:
            write_sparse(Path(place), config)
            found[name] = {}
            for recipe in USUAL if number else RECIPES:
                found[name][recipe] = row(Path(place), recipe)
                print(name, recipe, json.dumps(found[name][recipe]), flush=True)
    write_results(out, {"models": found})


if __name__ == "__main__":
    main()
