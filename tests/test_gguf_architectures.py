"""Hugging Face models as GGUF files without a template: names, rows, experts in one tensor, what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf_models import CONFIGS, SIZES, write_model, write_tokenizer
from libraries import swiglu_limit
from safetensors.torch import load_file

import outlierq
from outlierq.core.errors import OutlierqError, RecipeError, SourceError
from outlierq.export.gguf.architectures import architectures
from outlierq.export.gguf.names import expert_of, gguf_name
from outlierq.pipeline.ledger.output import Output

GGUF = "export.format=gguf"
FOUR_BITS = [GGUF, "quantize.group_size=32"]
SMALL = ["calibration.samples=4", "calibration.sequence_length=32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folders of models by their type and what is different in them, each made once. Read-only."""
    made: dict[str, Path] = {}

    def of(model_type: str, **more) -> Path:
        key = f"{model_type} {more}"
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("model") / model_type, model_type, **more)
        return made[key]

    return of


def written(folder, out, recipe="dense", settings=(GGUF,)) -> dict[str, gguf.ReaderTensor]:
    outlierq.quantize(str(folder), recipe, out=str(out), settings=list(settings))
    return {tensor.name: tensor for tensor in GGUFReader(out).tensors}


def numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_every_architecture_of_the_table_has_a_model_that_is_tried():
    assert architectures().keys() == CONFIGS.keys() and len(CONFIGS) > 20
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert {row.name for row in architectures().values()} <= known


@pytest.mark.parametrize(
    "model_type", ["qwen3", "gpt_oss", "deepseek_v3", "lfm2", "gemma2", "gemma4_text", "cohere2", "qwen3_next"]
)
def test_all_weights_of_a_model_are_in_its_file(model, model_type, tmp_path):
    folder = model(model_type)
    tensors = written(folder, tmp_path / "m.gguf")
    tensors.pop("rope_freqs.weight", None)  # follows from the config
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.n_elements for tensor in tensors.values()) == sum(weight.numel() for weight in stored.values())
    assert outlierq.verify(str(tmp_path / "m.gguf")).sound


def test_experts_that_are_stored_apart_lie_behind_each_other(model, tmp_path):
    folder = model("mixtral")
    tensors, stored = written(folder, tmp_path / "m.gguf"), load_file(folder / "model.safetensors")
    for part, leaf in (("ffn_gate_exps", "w1"), ("ffn_down_exps", "w2"), ("ffn_up_exps", "w3")):
        names = [f"model.layers.1.block_sparse_moe.experts.{expert}.{leaf}.weight" for expert in range(4)]
        assert np.array_equal(tensors[f"blk.1.{part}.weight"].data, torch.stack([stored[n] for n in names]).numpy())


def test_fused_experts_are_taken_apart_and_their_biases_too(model, tmp_path):
    folder = model("gpt_oss")
    tensors, stored = written(folder, tmp_path / "m.gguf"), load_file(folder / "model.safetensors")
    fused, biases = (stored[f"model.layers.0.mlp.experts.gate_up_proj{end}"] for end in ("", "_bias"))
    for part, first in (("ffn_gate_exps", 0), ("ffn_up_exps", 1)):
        assert np.array_equal(tensors[f"blk.0.{part}.weight"].data, fused[:, :, first::2].transpose(1, 2).numpy())
        assert np.array_equal(tensors[f"blk.0.{part}.bias"].data, biases[:, first::2].numpy())


def test_gains_that_are_stored_less_one_get_it_back(model, tmp_path):
    folder = model("gemma3_text", dtype="bfloat16")
    tensors, stored = written(folder, tmp_path / "m.gguf"), load_file(folder / "model.safetensors")
    gain = stored["model.layers.0.self_attn.q_norm.weight"].float() + 1
    assert np.array_equal(tensors["blk.0.attn_q_norm.weight"].data, gain.numpy())


def test_the_decay_of_linear_attention_is_no_logarithm_and_its_gain_is_whole(model, tmp_path):
    folder = model("qwen3_5_text", dtype="bfloat16")
    tensors, stored = written(folder, tmp_path / "m.gguf"), load_file(folder / "model.safetensors")
    decay = -stored["model.layers.0.linear_attn.A_log"].float().exp()
    assert np.array_equal(tensors["blk.0.ssm_a"].data, decay.numpy())
    own = {"ssm_dt.bias": "linear_attn.dt_bias", "ssm_norm.weight": "linear_attn.norm.weight"}
    for name, theirs in own.items():
        assert np.array_equal(tensors[f"blk.0.{name}"].data, stored[f"model.layers.0.{theirs}"].float().numpy())
    usual = stored["model.layers.0.input_layernorm.weight"].float() + 1
    assert np.array_equal(tensors["blk.0.attn_norm.weight"].data, usual.numpy())
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["qwen35.attention.recurrent_layers"].contents() == [True, True, True, False]


def test_what_makes_keys_and_values_becomes_two_tensors(model, tmp_path):
    folder = model("deepseek_v3")
    tensors, stored = written(folder, tmp_path / "m.gguf"), load_file(folder / "model.safetensors")
    both = stored["model.layers.0.self_attn.kv_b_proj.weight"].view(4, 32, 32).numpy()
    assert np.array_equal(tensors["blk.0.attn_k_b.weight"].data, both[:, :16].transpose(0, 2, 1))
    assert np.array_equal(tensors["blk.0.attn_v_b.weight"].data, both[:, 16:])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["rtn-w4", "gptq-w4"])
def test_rounded_experts_are_near_their_source_and_as_large_as_planned(model, model_type, recipe, tmp_path):
    folder, file = model(model_type), tmp_path / "m.gguf"
    settings = [*FOUR_BITS, *(SMALL if recipe == "gptq-w4" else [])]
    plan = outlierq.plan(str(folder), recipe, settings=settings)
    dense, tensors = written(folder, tmp_path / "d.gguf"), written(folder, file, recipe, settings)
    assert plan.output_bytes == file.stat().st_size
    assert outlierq.verify(str(file)).sound
    packed = [name for name, tensor in tensors.items() if tensor.tensor_type == GGMLQuantizationType.Q4_0]
    assert sum("_exps." in name for name in packed) == 6 and len(packed) == 14
    for name in packed:
        meant = numbers(dense[name])
        assert 0.02 < np.linalg.norm(numbers(tensors[name]) - meant) / np.linalg.norm(meant) < 0.3, name
    same = tensors.keys() - set(packed)
    assert same and all(np.array_equal(tensors[name].data, dense[name].data) for name in same)


def test_a_stopped_run_of_a_mixture_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    folder, settings = model("qwen3_moe"), [*FOUR_BITS, *SMALL]
    written(folder, tmp_path / "whole.gguf", "gptq-w4", settings)
    real, seen = Output.commit, []

    def stopping(self, *rest, **named):
        seen.append(rest)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(self, *rest, **named)

    monkeypatch.setattr(Output, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        written(folder, tmp_path / "cut.gguf", "gptq-w4", settings)
    monkeypatch.setattr(Output, "commit", real)
    written(folder, tmp_path / "cut.gguf", "gptq-w4", settings)
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_experts_of_a_block_cannot_have_several_types(model, tmp_path):
    folder = model("qwen3_moe")
    with pytest.raises(RecipeError, match=r"experts of blk\.0\.ffn_gate_exps\.weight would be stored in several ways"):
        outlierq.plan(str(folder), "rtn-w4", settings=[*FOUR_BITS, "quantize.ignore=['*.experts.2.gate_proj']"])


def test_of_a_model_that_sees_the_language_model_is_written_and_the_rest_is_said(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sees = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    tokens = {"boi_token_index": 250, "eoi_token_index": 251, "image_token_index": 252}
    text = {**SIZES, **CONFIGS["gemma3_text"]}
    config = Gemma3Config(text_config=text, vision_config=sees, mm_tokens_per_image=1, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    notes = outlierq.plan(str(tmp_path / "model"), "dense", settings=[GGUF]).notes
    assert any("more: left out, the file holds the language model alone" in note for note in notes)
    tensors = written(tmp_path / "model", tmp_path / "m.gguf")
    assert len(tensors) == 80 and "blk.5.attn_q_norm.weight" in tensors


def test_that_llama_cpp_rounds_the_bounds_of_yarn_is_said(model, tmp_path):
    notes = outlierq.plan(str(model("gpt_oss")), "dense", settings=[GGUF]).notes
    assert any("rounds the bounds of YaRN" in note for note in notes)


REFUSED = [
    ("mistral", {"sliding_window": 8}, "attends to a window of 8 tokens"),
    ("qwen2_moe", {"norm_topk_prob": True}, "has norm_topk_prob True"),
    ("gemma4_text", {"num_kv_shared_layers": 2}, "here these are full_attention and sliding_attention"),
    ("gemma4_text", {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 64}, "have another vocabulary"),
    ("qwen3_moe", {"norm_topk_prob": False}, "has norm_topk_prob False"),
    ("gemma3_text", {"query_pre_attn_scalar": 16}, "has query_pre_attn_scalar 16"),
    ("gemma2", {"tie_word_embeddings": False}, "has an output head of its own|has no name"),
    ("smollm3", {"no_rope_layer_interval": 2}, "rotates the layers"),
    ("exaone4", {"num_hidden_layers": 4}, "attends to a window of 8 tokens"),
    ("starcoder2", {"hidden_act": "relu"}, "has the activation relu"),
    pytest.param("gpt_oss", {"swiglu_limit": 3.0}, "has swiglu_limit 3.0", marks=swiglu_limit),
    ("qwen3_5_text", {"linear_num_value_heads": 4}, "has 4 heads of values for 2 of keys"),
    ("qwen3_next", {"linear_value_head_dim": 32}, "has linear_value_head_dim 32"),
    ("deepseek_v2", {"num_hidden_layers": 3}, "of 26 or 27 layers only"),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        r"embedding \(dynamic\)",
    ),
]


@pytest.mark.parametrize(("model_type", "more", "said"), REFUSED)
def test_what_llama_cpp_computes_in_another_way_is_refused(model, model_type, more, said, tmp_path):
    folder = model(model_type, **more)
    with pytest.raises(OutlierqError, match=said):
        outlierq.plan(str(folder), "dense", settings=[GGUF])


def test_an_architecture_that_is_not_proved_is_refused_with_what_to_do(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=288, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(SourceError, match="is a gpt_neox") as caught:
        outlierq.plan(str(tmp_path / "model"), "dense", settings=[GGUF])
    assert "--like" in str(caught.value.hint)


def test_names_are_those_of_gguf_and_experts_are_numbered():
    assert gguf_name("model.layers.11.block_sparse_moe.experts.3.w2.weight") == "blk.11.ffn_down_exps.weight"
    assert gguf_name("model.layers.7.mlp.gate.e_score_correction_bias", "glm4moe") == "blk.7.exp_probs_b.bias"
    assert gguf_name("model.layers.0.self_attn.sinks", "gpt-oss") == "blk.0.attn_sinks.weight"
    assert expert_of("model.layers.11.mlp.experts.31.up_proj.weight") == 31
    assert expert_of("model.layers.11.mlp.shared_experts.up_proj.weight") is None
