"""Plan a checkpoint of the shape of DeepSeek-V3 (671B, FP8 in blocks) from headers: `python scripts/plan_large.py`.

Its 163 weight files are sparse: they have their full length and a header, and hold nothing. Prints the seconds and the
peak memory of `outlierq plan`, which must stay below 60 s (of a processor: others may be at work) and 2 GB. `--profile`
prints where the time went.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LAYERS, DENSE, EXPERTS, HIDDEN, EXPERT_WIDTH, DENSE_WIDTH = 61, 3, 256, 7168, 2048, 18432
SHARDS, BLOCK = 163, 128
MOST_SECONDS, MOST_BYTES = 60, 2e9
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "first_k_dense_replace": DENSE, "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": DENSE_WIDTH,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": EXPERT_WIDTH, "n_group": 8,
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": LAYERS, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 4, "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
    },
}  # fmt: skip

Shape = tuple[int, ...]


def linear(module: str, rows: int, columns: int) -> Iterator[tuple[str, str, Shape]]:
    """An FP8 weight and its scales."""
    yield f"{module}.weight", "F8_E4M3", (rows, columns)
    yield f"{module}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


def mlp(module: str, width: int) -> Iterator[tuple[str, str, Shape]]:
    """Three linears."""
    yield from linear(f"{module}.gate_proj", width, HIDDEN)
    yield from linear(f"{module}.up_proj", width, HIDDEN)
    yield from linear(f"{module}.down_proj", HIDDEN, width)


def block(index: int) -> Iterator[tuple[str, str, Shape]]:
    """One decoder block."""
    at = f"model.layers.{index}"
    yield from linear(f"{at}.self_attn.q_a_proj", 1536, HIDDEN)
    yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
    yield from linear(f"{at}.self_attn.q_b_proj", 128 * 192, 1536)
    yield from linear(f"{at}.self_attn.kv_a_proj_with_mqa", 512 + 64, HIDDEN)
    yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
    yield from linear(f"{at}.self_attn.kv_b_proj", 128 * 256, 512)
    yield from linear(f"{at}.self_attn.o_proj", HIDDEN, 128 * 128)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{norm}.weight", "BF16", (HIDDEN,)
    if index < DENSE:
        yield from mlp(f"{at}.mlp", DENSE_WIDTH)
        return
    for expert in range(EXPERTS):
        yield from mlp(f"{at}.mlp.experts.{expert}", EXPERT_WIDTH)
    yield from mlp(f"{at}.mlp.shared_experts", EXPERT_WIDTH)
    yield f"{at}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
    yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)


def tensors() -> Iterator[tuple[str, str, Shape]]:
    """(name, dtype, shape) of everything, the extra block for multi-token prediction last."""
    yield "model.embed_tokens.weight", "BF16", (CONFIG["vocab_size"], HIDDEN)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (CONFIG["vocab_size"], HIDDEN)
    for index in range(LAYERS + 1):
        yield from block(index)
    at = f"model.layers.{LAYERS}"
    yield f"{at}.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{at}.{norm}.weight", "BF16", (HIDDEN,)


def write_sparse(folder: Path) -> int:
    """The checkpoint; gives its bytes, which no disk holds."""
    everything, widths = list(tensors()), {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    share = -(-len(everything) // SHARDS)
    places, total = {}, 0
    for number in range(SHARDS):
        name, header, end = f"model-{number + 1:05d}-of-{SHARDS:06d}.safetensors", {}, 0
        for tensor, dtype, shape in everything[number * share : (number + 1) * share]:
            size = widths[dtype]
            for each in shape:
                size *= each
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            places[tensor], end = name, end + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def main() -> int:
    """Write, plan, say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", "--recipe", default="rtn-w4")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        total = write_sparse(Path(place))
        import outlierq

        began, worked, profile = time.perf_counter(), time.process_time(), cProfile.Profile()
        if options.profile:
            profile.enable()
        plan = outlierq.plan(place, recipe=options.recipe, settings=options.set)
        said = plan.to_dict()
        profile.disable()
        seconds, worked = time.perf_counter() - began, time.process_time() - worked
    if options.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    what = f"{total / 1e9:.0f} GB in {len(said['sites'])} linears"
    print(f"{what}: {seconds:.1f} s ({worked:.1f} s of a processor), {peak / 1e9:.2f} GB")
    return int(worked > MOST_SECONDS or peak > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
