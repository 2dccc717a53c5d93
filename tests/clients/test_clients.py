"""Real programs load what we write, and compute what the dequantized model computes.

Their arithmetic is not ours: bfloat16 instead of float32, other orders of summation. Where inputs are rounded to 8
bits, a small difference becomes a whole step. What arithmetic alone may do is what bfloat16 does to the dequantized
model, token by token (`ARITHMETIC`); of the perplexity it is what the same clients show on checkpoints that other
tools wrote (`PERPLEXITY`, docs/clients.md).
"""

from __future__ import annotations

import re
import shutil

import pytest

from clients.exports import EXPORTS
from clients.jobs import Agreement, Dequantized, Refused, agreement, ask

pytestmark = pytest.mark.clients

PERPLEXITY = {"16-bit inputs": 0.005, "8-bit inputs": 0.03}  # relative differences
# A client may differ by so many times what bfloat16 does to the dequantized model. llama.cpp also multiplies in int8.
ARITHMETIC = {"llama.cpp": 2.0, "others": 1.5}
EIGHT_BIT = ("ct-w8a8", "ct-w8a8-static", "ct-w8a8-rotated", "ct-w4a8", "ct-fp8", "ct-kv-fp8", "bitsandbytes")

# By checkpoint, so that the tests of one follow each other.
LOADED = {
    "dense": ("transformers", "vllm"),
    "ct-w4": ("transformers", "vllm"),
    "ct-w4-two-groups": ("transformers", "vllm"),
    "ct-w4-asym": ("transformers", "vllm"),
    "ct-w8": ("transformers",),
    "ct-w8a8": ("transformers", "vllm"),
    "ct-w8a8-static": ("transformers",),  # with AMX, vLLM computes its scales per token
    "ct-w8a8-rotated": ("transformers", "vllm"),
    "ct-w4a8": ("transformers",),  # in vLLM a kernel for Arm, of which x86 has only a slow reference
    "ct-fp8": ("transformers",),  # minutes for a sentence in vLLM without AMX-FP8
    "ct-kv-fp8": ("transformers",),
    "ct-nvfp4": ("transformers",),
    "ct-mxfp4": ("transformers",),
    "awq": ("gptqmodel", "vllm"),
    "awq-sym": ("gptqmodel", "vllm"),
    "gptq": ("gptqmodel", "vllm"),
    "gptq-asym": ("gptqmodel",),
    "gptq-v2": ("gptqmodel", "vllm"),
    "gptq-v2-asym": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "gguf-q4_0": ("transformers", "llama.cpp"),
    "gguf-q4_1": ("transformers", "llama.cpp"),
    "gguf-q4_k": ("transformers", "llama.cpp"),
    "gguf-mxfp4": ("llama.cpp",),
    "gguf-q8_0": ("transformers", "llama.cpp"),
}
GGUF_OPTIONS = {"transformers": {"gguf_file": "model.gguf"}}
PAIRS = [(name, client) for name, clients in LOADED.items() for client in clients]

REFUSED = {
    ("gptq-asym", "vllm"): "Unsupported quantization config",
    ("gptq-v2-asym", "vllm"): "Unsupported quantization config",
    ("ct-w8", "vllm"): "Failed to find a kernel",
    ("ct-nvfp4", "vllm"): "NVFP4|NvFp4|nvfp4",
    ("ct-mxfp4", "vllm"): "Failed to find a kernel that can implement the MXFP4 linear layer",
}


def faults(name: str, client: str, found: Agreement, arithmetic: float) -> list[str]:
    """What the client's own arithmetic does not explain. Its greedy tokens may differ where two are nearly equal."""
    inputs = "8-bit inputs" if name in EIGHT_BIT or client == "llama.cpp" else "16-bit inputs"
    limits = {
        "ratio of perplexities - 1": (abs(found.ratio - 1), PERPLEXITY[inputs]),
        "typical": (found.typical, arithmetic * ARITHMETIC.get(client, ARITHMETIC["others"])),
        "regret": (found.regret, 2 * found.large),  # it compares two tokens, and the loss of each may be off
    }
    return [f"{key}: {value:.4f} above {limit:.4f}" for key, (value, limit) in limits.items() if value > limit]


def facts(name: str, client: str, source: str) -> list[str]:
    """What the plan says about a client, such as "vLLM 0.32.0", and the weights of this export."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.recipe import load

    export = EXPORTS[name]
    lines = make_plan(open_checkpoint(source), load(export.recipe, list(export.settings))).clients
    version = "llama.cpp" if client.startswith("llama") else client.rpartition(".")[0]
    named = re.compile(rf"(every client|{re.escape(version)}( with .*| \(.*\))?): ")
    return [line.partition(": ")[2] for line in lines if named.match(line)]


@pytest.mark.parametrize(("name", "client"), PAIRS)
def test_a_client_computes_what_the_dequantized_model_computes(name, client, exported, dequantized, record, tmp_path):
    folder = exported(name)
    answer = ask(client, folder, tmp_path, **(GGUF_OPTIONS.get(client, {}) if name.startswith("gguf") else {}))
    model = dequantized(folder)
    found = agreement(answer, model)
    record(answer.client, name, found)
    assert not faults(name, client, found, model.arithmetic)
    said = facts(name, answer.client, str(exported("dense")))
    assert len(said) == 1 and said[0].startswith("loads"), said


@pytest.mark.parametrize(("name", "client"), REFUSED)
def test_a_client_refuses_what_the_plan_says_that_it_refuses(name, client, exported, tmp_path):
    with pytest.raises(Refused, match=REFUSED[name, client]):
        ask(client, exported(name), tmp_path)
    said = facts(name, "vLLM 0.32.0", str(exported("dense")))
    assert len(said) == 1 and not said[0].startswith("loads"), said


def test_vllm_takes_the_scales_of_the_cache(exported, record, monkeypatch, tmp_path):
    """Its CPU build cuts keys and values off where it should round them to the nearest number."""
    import torch

    from outlierq.ops import activations

    def cut_off(x: torch.Tensor, scheme: object, scale: torch.Tensor) -> torch.Tensor:
        """E4M3 has 3 bits of fraction; float32 has 20 more."""
        bits = (x.float() / scale).clamp(-448, 448).view(torch.int32) >> 20 << 20
        return (bits.view(torch.float32) * scale).to(x.dtype)

    monkeypatch.setattr(activations, "fake_quantize", cut_off)
    folder = exported("ct-kv-fp8")
    answer = ask("vllm", folder, tmp_path)
    model = Dequantized(folder)
    found = agreement(answer, model)
    record(answer.client, "ct-kv-fp8, cut off", found)
    assert not faults("ct-kv-fp8", "vllm", found, model.arithmetic)


def test_one_scale_that_is_wrong_by_a_quarter_is_noticed(exported, dequantized, tmp_path):
    from safetensors.torch import load_file, save_file

    damaged = shutil.copytree(exported("ct-w4"), tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.10.mlp.down_proj.weight_scale"] *= 1.25
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    answer = ask("transformers", damaged, tmp_path)
    model = dequantized(exported("ct-w4"))
    found = agreement(answer, model)
    assert faults("ct-w4", "transformers", found, model.arithmetic), found
