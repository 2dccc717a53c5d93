"""The stress model computes what its source computes, and its outliers are where they were put."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from outlierq.core.errors import OutlierqError, SourceError
from outlierq.load import load_model, open_checkpoint
from outlierq.testing.stress import stressed

SCRIPT = Path(__file__).parents[1] / "scripts" / "stress_model.py"
SMALL = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GLU = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES = {
    "gemma, whose norms store the gain minus one": ("Gemma2Config", {**GLU, "head_dim": 16, "sliding_window": 8}),
    "opt, whose norms and linears have biases": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48},
    ),
    "gpt2, which stores weights [in, out]": (
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
}
IDS = torch.arange(3, 43).view(2, 20)


def saved(folder: Path, config: str, arguments: dict, dtype: str) -> Path:
    """A random model of some architecture, with gains that are not all alike."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def logits(checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint)(IDS).logits


def change(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_function_stays_the_same(tmp_path, architecture):
    plain = open_checkpoint(str(saved(tmp_path / "model", *ARCHITECTURES[architecture], "float32")))
    changed = stressed(plain, 4, 60.0)
    assert len(changed.groups) == 4
    assert change(logits(changed), logits(plain)) < 1e-5


def test_a_power_of_two_gives_the_same_bits(tiny_llama):
    plain = open_checkpoint(str(tiny_llama))
    changed = stressed(plain, 5, 64.0)
    assert torch.equal(logits(changed), logits(plain))
    assert any(not torch.equal(changed.read(name), plain.read(name)) for name in plain.tensors)


def test_rounding_to_bfloat16_costs_less_than_the_rounding_of_the_weights_itself(tiny_llama):
    plain = open_checkpoint(str(tiny_llama))
    assert 0 < change(logits(stressed(plain, 5, 60.0)), logits(plain)) < 2**-8


def test_the_inputs_of_the_linears_are_larger_in_these_channels_alone(tiny_llama):
    plain = open_checkpoint(str(tiny_llama))
    changed = stressed(plain, [7, 3], 60.0)
    assert changed.channels == (3, 7)
    seen = {}
    for name, checkpoint in (("plain", plain), ("changed", changed)):
        model = load_model(checkpoint)
        layer = model.model.layers[1].mlp.up_proj
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1)))
        with torch.no_grad():
            model(IDS)
    ratio = seen["changed"].abs().amax(0) / seen["plain"].abs().amax(0)
    others = [channel for channel in range(64) if channel not in changed.channels]
    assert ratio[[3, 7]].sub(60).abs().max() < 0.5
    assert ratio[others].sub(1).abs().max() < 0.02


def test_the_same_seed_draws_the_same_channels(tiny_llama):
    plain = open_checkpoint(str(tiny_llama))
    first, again, other = stressed(plain, 6), stressed(plain, 6), stressed(plain, 6, seed=1)
    assert first.channels == again.channels != other.channels
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, plain.fingerprint}) == 3


@pytest.mark.parametrize("channels", [0, 65, [64], [-1]])
def test_channels_that_do_not_exist_are_refused(tiny_llama, channels):
    with pytest.raises(OutlierqError, match="0 to 63"):
        stressed(open_checkpoint(str(tiny_llama)), channels)


def test_a_factor_that_makes_no_outliers_is_refused(tiny_llama):
    with pytest.raises(OutlierqError, match="no outliers"):
        stressed(open_checkpoint(str(tiny_llama)), 2, 0.5)


def test_a_model_without_a_norm_before_its_linears_is_refused(tmp_path):
    folder = saved(tmp_path / "model", "Olmo2Config", GLU, "float32")
    with pytest.raises(SourceError, match="no norm"):
        stressed(open_checkpoint(str(folder)), 2)


def test_the_script_writes_a_folder_that_transformers_loads(tiny_llama, tmp_path):
    out = tmp_path / "stress"
    words = [sys.executable, SCRIPT, tiny_llama, out, "--channels", "2", "9", "--factor", "64"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    assert "channels: 2 9" in done.stdout
    found = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    with torch.no_grad():
        assert change(found(IDS).logits, logits(open_checkpoint(str(tiny_llama)))) < 1e-6
