"""Blocks that predict further tokens (MTP): rounded like the others by recipes without data, kept by the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import outlierq
from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import EXTRA_KEPT
from outlierq.recipe import load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from coverage_models import tiny_model, write_checkpoint


def with_extra(folder: Path, name: str, block: str) -> Path:
    """A tiny model whose last block is stored once more under another name, beside the projection that feeds it."""
    model = tiny_model(name, "text")
    write_checkpoint(model, folder)
    tensors, last = load_file(folder / "model.safetensors"), f"model.layers.{model.config.num_hidden_layers - 1}."
    copied = {block + key.removeprefix(last): value for key, value in tensors.items() if key.startswith(last)}
    tensors |= {key: value.clone() for key, value in copied.items()}
    tensors[f"{block.split('.layers')[0]}.fc.weight"] = torch.randn(128, 256).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def next_tokens(tmp_path_factory) -> Path:
    """A tiny Qwen3-Next with `mtp.layers.0`; read-only."""
    return with_extra(tmp_path_factory.mktemp("mtp") / "source", "qwen3_next", "mtp.layers.0.")


def test_an_extra_block_is_rounded_by_a_recipe_that_looks_at_no_data(next_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    outlierq.quantize(next_tokens, "rtn-w8", out=tmp_path / "out", device="cpu")
    stored, source = outlierq.open(tmp_path / "out").tensors, load_file(next_tokens / "model.safetensors")
    assert stored["mtp.layers.0.mlp.experts.2.up_proj.weight_packed"].dtype == "I32"
    assert stored["mtp.fc.weight"].dtype == stored["mtp.layers.0.mlp.gate.weight"].dtype == "BF16"
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert not any("mtp" in pattern and "proj" in pattern for pattern in ignored)
    plain, name = unpacked(open_checkpoint(str(tmp_path / "out"))), "mtp.layers.0.self_attn.q_proj.weight"
    assert (plain.read(name).float() - source[name].float()).norm() < 0.02 * source[name].float().norm()
    assert not outlierq.verify(tmp_path / "out", next_tokens).faults
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_recipe_that_needs_statistics_keeps_it_and_says_so(next_tokens):
    plan = make_plan(open_checkpoint(str(next_tokens)), load("gptq-w4"))
    assert any(note.startswith("mtp.*") and note.endswith(EXTRA_KEPT) for note in plan.notes)
    assert not any(planned.site.module.startswith("mtp") for planned in plan.sites)


def test_half_a_block_is_no_block(tmp_path):
    source = with_extra(tmp_path / "source", "qwen3_next", "mtp.layers.0.")
    tensors = load_file(source / "model.safetensors")
    del tensors["mtp.layers.0.mlp.shared_expert.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = make_plan(open_checkpoint(str(source)), load("rtn-w8"))
    assert not any(planned.site.module.startswith("mtp") for planned in plan.sites)


def test_a_block_behind_the_last_one_that_the_config_announces_is_no_fault(tmp_path):
    source = with_extra(tmp_path / "source", "deepseek_v3", "model.layers.4.")
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    outlierq.quantize(source, "rtn-w8", out=tmp_path / "out", device="cpu")
    assert outlierq.open(tmp_path / "out").tensors["model.layers.4.self_attn.o_proj.weight_packed"].dtype == "I32"
    faults = outlierq.verify(tmp_path / "out", source).faults
    assert [fault.tensor for fault in faults] == ["model.fc.weight"]
