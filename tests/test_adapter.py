"""What a low rank gives back of a rounded checkpoint, as a LoRA adapter that PEFT loads on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import outlierq
from outlierq.core.errors import OutlierqError
from outlierq.load import load_model, open_checkpoint

IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def statistics(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "stats"
    settings = {"calibration.unseen_tokens": False}  # what is judged on are other ids than those
    outlierq.calibrate(tiny_llama, out=out, settings=settings, samples=32, sequence_length=32, device="cpu")
    return out


@pytest.fixture(scope="module")
def compressed(tiny_llama, statistics, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "w4"
    settings = {"quantize.group_size": 32}
    outlierq.quantize(tiny_llama, "gptq-w4", out=out, settings=settings, stats=statistics, device="cpu")
    return out


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)))(IDS).logits


def test_peft_loads_it_on_the_compressed_checkpoint_and_it_brings_the_original_nearer(
    tiny_llama, statistics, compressed, tmp_path
):
    PeftModel = pytest.importorskip("peft").PeftModel
    from transformers import AutoModelForCausalLM

    made = outlierq.adapter(tiny_llama, compressed, stats=statistics, out=tmp_path / "adapter", rank=16)
    assert made.after < 0.5 * made.before and all(row.after < row.before for row in made.rows)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(made.rows) and made.parameters == sum(t.numel() for t in tensors.values())
    base = AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)
    with torch.no_grad():
        plain = base(IDS).logits.clone()
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(IDS).logits
    original = logits(tiny_llama)
    assert (adapted - original).norm() < 0.75 * (plain - original).norm()
    merged = load_model(open_checkpoint(str(compressed)))
    for row in made.rows:
        a, b = (tensors[f"base_model.model.{row.site}.lora_{name}.weight"].float() for name in "AB")
        merged.get_submodule(row.site).weight.data += b @ a
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, adapted, rtol=1e-3, atol=1e-3 * original.abs().max().item())


def test_linears_with_one_input_share_their_first_matrix(tiny_llama, statistics, compressed, tmp_path):
    outlierq.adapter(tiny_llama, compressed, stats=statistics, out=tmp_path / "adapter", rank=4)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = [t for name, t in tensors.items() if ".0.self_attn." in name and "lora_A" in name and "o_proj" not in name]
    assert len(first) == 3 and all(torch.equal(first[0], other) for other in first)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and "q_proj" in config["target_modules"]


def test_what_an_adapter_cannot_fit_is_refused_before_it_is_written(tiny_llama, statistics, compressed, tmp_path):
    def adapter(other, **settings):
        return outlierq.adapter(tiny_llama, other, stats=statistics, out=tmp_path / "adapter", **settings)

    scaled = tmp_path / "awq"
    settings = {"quantize.group_size": 32}
    outlierq.quantize(tiny_llama, "awq-w4", out=scaled, settings=settings, stats=statistics, device="cpu")
    with pytest.raises(OutlierqError, match="moved scales") as caught:
        adapter(scaled)
    assert "gptq-w4" in caught.value.hint
    with pytest.raises(OutlierqError, match=r"1000 is more than .* can have"):
        adapter(compressed, rank=1000)
    with pytest.raises(OutlierqError, match="no rounded linear"):
        adapter(tiny_llama)
    assert not (tmp_path / "adapter").exists()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    with pytest.raises(OutlierqError, match="holds something else"):
        adapter(compressed)
