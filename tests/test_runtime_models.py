"""Whole models on packed weights: as close to the dense model as 16 bits allow, through every command of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from outlierq.core.notes import collecting
from outlierq.load import load_model, load_tokenizer, open_checkpoint
from outlierq.pipeline.measuring.models import load_for_evaluation
from outlierq.pipeline.measuring.packed_model import runtime_summary
from outlierq.runtime import QuantLinear

IDS = torch.arange(4 * 48).view(4, 48) * 7 % 260
LINEARS = 14  # of the tiny model: seven in each of two blocks

# recipe -> (settings, what its linears do)
RECIPES = {
    "rtn-w4": (("quantize.group_size=32",), "packed 4-bit"),
    "rtn-w8": ((), "packed 8-bit"),
    "w8a8-dynamic": ((), "int8 with int8"),
    "w8a8-static": ((), "int8 with int8"),
    "fp8-dynamic": ((), "packed fp8"),
    "nvfp4": ((), "packed nvfp4"),
    "mxfp4-w4a8": ((), "packed mxfp4"),
    "mxfp8": ((), "packed mxfp8"),
    "int8-split": ((), "int8 with int8"),
    "olive-w4": ((), "packed outlier-victim"),
}


@pytest.fixture(scope="module")
def compressed(tiny_llama, tmp_path_factory):
    """A function: recipe name -> folder of the tiny model compressed by it, made once."""
    from outlierq import recipe
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize

    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("packed") / name
            chosen = recipe.load(name, list(RECIPES[name][0]))
            if chosen.calibration is not None:
                small = ["calibration.samples=4", "calibration.sequence_length=32"]
                chosen = recipe.load(name, [*RECIPES[name][0], *small])
            quantize(make_plan(open_checkpoint(str(tiny_llama)), chosen), folders[name])
        return folders[name]

    return make


def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits.double().log_softmax(-1)


def divergence(truth: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL per token in nats."""
    return (truth.exp() * (truth - other)).sum(-1).mean().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_packed_model_is_as_near_to_the_dense_one_as_bfloat16_is(compressed, recipe):
    checkpoint = open_checkpoint(str(compressed(recipe)))
    truth = log_probabilities(load_model(checkpoint))
    noise = divergence(truth, log_probabilities(load_model(checkpoint, dtype="bfloat16")))
    packed = load_for_evaluation(checkpoint, dtype="bfloat16", runtime="packed")
    assert sum(isinstance(part, QuantLinear) for part in packed.modules()) == LINEARS
    assert 0 < noise < 1e-3
    assert divergence(truth, log_probabilities(packed)) < 2 * noise
    assert f"{LINEARS} linears" in runtime_summary(packed)[0]
    assert RECIPES[recipe][1] in runtime_summary(packed)[0]


def test_biases_and_an_untied_head_come_along(tools, tmp_path):
    from safetensors.torch import load_file, save_file

    from outlierq import recipe
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize

    folder = tools.write_llama(tmp_path / "llama", dtype="float32", tie_word_embeddings=False, attention_bias=True)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({n: torch.randn_like(t) if n.endswith("bias") else t for n, t in tensors.items()}, file, {"format": "pt"})
    chosen = recipe.load("rtn-w4", ["quantize.group_size=32"])
    quantize(make_plan(open_checkpoint(str(folder)), chosen), tmp_path / "out")
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    packed = load_for_evaluation(checkpoint, dtype="float32", runtime="packed")
    dense = log_probabilities(load_model(checkpoint))
    assert packed.model.layers[0].self_attn.q_proj.bias.abs().sum() > 0
    assert divergence(dense, log_probabilities(packed)) < 1e-9


def test_no_dense_weight_is_left_in_a_packed_model(compressed):
    checkpoint = open_checkpoint(str(compressed("rtn-w4")))
    packed = load_for_evaluation(checkpoint, dtype="bfloat16", runtime="packed")
    assert {part.device.type for part in (*packed.parameters(), *packed.buffers())} == {"cpu"}
    assert not [n for n, part in packed.named_modules() if isinstance(part, torch.nn.Linear) and "layers" in n]


def test_generation_goes_through_packed_weights(compressed, tiny_llama):
    from outlierq.evaluate.generation import complete

    checkpoint = open_checkpoint(str(compressed("rtn-w4")))
    tokenizer = load_tokenizer(checkpoint)
    packed = load_for_evaluation(checkpoint, dtype="bfloat16", runtime="packed")
    calls = []
    for part in packed.modules():
        if isinstance(part, QuantLinear):
            part.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    complete(packed, tokenizer, "The sea", max_new_tokens=4)
    assert calls.count(1) >= LINEARS  # single tokens, after the prompt


def test_a_plain_checkpoint_is_loaded_dense_and_says_so(tiny_llama):
    model = load_for_evaluation(open_checkpoint(str(tiny_llama)), dtype="bfloat16", runtime="packed")
    assert "no packed weight" in runtime_summary(model)[0]


def test_what_cannot_be_packed_stays_what_the_loader_makes_of_it(compressed, monkeypatch):
    from outlierq.core.errors import SourceError
    from outlierq.load.packed.compressed_tensors import UnpackedCheckpoint

    checkpoint = open_checkpoint(str(compressed("rtn-w4")))
    dense = log_probabilities(load_model(checkpoint))

    def refuse(self, name):
        raise SourceError("groups in activation order")

    monkeypatch.setattr(UnpackedCheckpoint, "quantized", refuse)
    with collecting() as notes:
        model = load_for_evaluation(checkpoint, dtype="float32", runtime="packed")
    assert len(notes) == LINEARS
    assert "activation order" in notes[0]
    assert divergence(dense, log_probabilities(model)) < 1e-9


def test_eval_measures_the_packed_model_and_says_how_it_computes(outlierq, compressed, tiny_llama):
    words = ("--windows", 2, "--window-length", 32, "--no-cache", "--json")
    answer = outlierq("eval", compressed("rtn-w4"), "--reference", tiny_llama, "--runtime", "packed", *words)
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert (found["runtime"], found["dtype"]) == ("packed", "bfloat16")
    assert f"{LINEARS} linears multiply packed 4-bit weights" in answer.err
    assert found["divergence"]["kl_per_token"] > 0
    dense = json.loads(outlierq("eval", compressed("rtn-w4"), "--reference", tiny_llama, *words).out)
    assert (dense["runtime"], dense["dtype"]) == ("dense", "float32")
    assert abs(dense["divergence"]["perplexity"] / found["divergence"]["perplexity"] - 1) < 0.02


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--runtime", "fast"), "dense or packed"), (("--runtime", "packed", "--backend", "vllm"), "own kernels")],
)
def test_a_runtime_that_does_not_exist_is_wrong_usage(outlierq, tiny_llama, words, said):
    answer = outlierq("eval", tiny_llama, *words)
    assert answer.code == 2
    assert said in " ".join(answer.err.replace("│", " ").split())


def test_bench_times_every_kind_beside_the_16_bit_product(outlierq):
    answer = outlierq("bench", "--shape", "128x256", "--tokens", "1,3", "--rounds", 1, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [(row["kind"], row["tokens"]) for row in found["timings"]] == [
        (kind, tokens) for kind in ("w4", "w8", "w8a8") for tokens in (1, 3)
    ]
    assert min(found["ceilings"].values()) > 0
    for row in found["timings"]:
        assert row["over_16bit"] == pytest.approx(row["dense_seconds"] / row["seconds"], rel=0.01, abs=1e-3)
    packed = 128 * 256 / 2 + 2 * 2 * 128 * 2  # codes, and a pair of scale and zero for each of two groups
    assert found["timings"][0]["nbytes"] == packed + 2 * (256 + 128)


def test_bench_shows_a_table(outlierq):
    answer = outlierq("bench", "--shape", "128x256", "--tokens", "1", "--rounds", 1, "--kind", "w4")
    assert answer.code == 0, answer.err
    assert "W4A16 g128" in answer.out and "128×256" in answer.out and "…" not in answer.out
    assert "measured now" in " ".join(answer.out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "4096"), "OUTxIN"),
        (("--shape", "100x64"), "multiples of 32"),
        (("--shape", "64x64"), "multiple of 128"),
        (("--tokens", "0"), "list of numbers"),
        (("--kind", "w5"), "choose w4"),
    ],
)
def test_bench_refuses_what_it_cannot_time(outlierq, words, said):
    answer = outlierq("bench", *words)
    assert answer.code == 2
    assert said in " ".join(answer.err.replace("│", " ").split())
