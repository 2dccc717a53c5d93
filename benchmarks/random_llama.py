"""Write a Llama checkpoint with random bf16 weights, shard by shard, so that its size is bounded by the disk alone.

With `num_experts` in its config it is a Qwen3-MoE, which stores each expert apart.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCKS_PER_SHARD = 4
STANDARD_DEVIATION = 0.02  # initializer_range of Llama


def write_random_llama(folder: Path, config: dict, tokenizer_from: Path | None = None, seed: int = 0) -> int:
    """Write the checkpoint that `config` (a Hugging Face Llama config) describes; return the bytes of its weights.

    tokenizer_from: folder whose tokenizer files are copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards(config, generator), start=1):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in tokenizer_from.glob("tokenizer*") if tokenizer_from else []:
        shutil.copy(file, folder)
    return total


def shards(config: dict, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after the other: the embedding, then BLOCKS_PER_SHARD blocks at a time, then the end."""
    hidden, vocabulary, blocks = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    yield {"model.embed_tokens.weight": random_weight(vocabulary, hidden, generator)}
    for start in range(0, blocks, BLOCKS_PER_SHARD):
        numbers = range(start, min(start + BLOCKS_PER_SHARD, blocks))
        yield {name: tensor for number in numbers for name, tensor in block(number, config, generator).items()}
    end = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    if not config["tie_word_embeddings"]:
        end["lm_head.weight"] = random_weight(vocabulary, hidden, generator)
    yield end


def block(number: int, config: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of decoder block `number`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
    }
    experts = config.get("num_experts")
    if experts:
        shapes["mlp.gate"] = experts, hidden
    for part in [f"mlp.experts.{expert}" for expert in range(experts)] if experts else ["mlp"]:
        shapes |= {f"{part}.gate_proj": (inner, hidden), f"{part}.up_proj": (inner, hidden)}
        shapes[f"{part}.down_proj"] = hidden, inner
    prefix = f"model.layers.{number}"
    tensors = {f"{prefix}.{name}.weight": random_weight(*shape, generator) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for norm in ("q_norm", "k_norm") if experts else ():
        tensors[f"{prefix}.self_attn.{norm}.weight"] = torch.ones(head, dtype=torch.bfloat16)
    return tensors


def random_weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A bf16 weight with normal entries: [rows, columns]."""
    return (torch.randn(rows, columns, generator=generator) * STANDARD_DEVIATION).to(torch.bfloat16)
