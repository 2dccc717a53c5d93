"""What a recipe leaves alone keeps the codes of a compressed source; what is read and written again is the same."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_sources import fp8_blocks, fp8_scaled, write_pair
from safetensors.torch import load_file

from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

SETTINGS = ["quantize.group_size=32", "quantize.ignore=[lm_head, '*.mlp.*']"]


def check_kept(source, out, scale):
    """Every linear of the MLPs has its codes and scales byte for byte, the others do not."""
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    decoded, original = (unpacked(open_checkpoint(str(folder))) for folder in (out, source))
    names = [name for name in original.linears if ".mlp." in name]
    assert len(names) == 6 and len(decoded.linears) == 14
    for name in names:
        assert torch.equal(decoded.read(name), original.read(name)), name
        if name in before:
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
            assert torch.equal(before[f"{name}{scale}"], after[f"{name}_scale"].view_as(before[f"{name}{scale}"]))
    assert verify(str(out), str(source)).faults == []


@pytest.mark.parametrize("recipe", ["rtn-w4", "gptq-w4"])
def test_fp8_blocks_stay_and_are_declared_as_such(recipe, tiny_llama, small, tmp_path):
    description = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    pair = write_pair(tiny_llama, tmp_path, fp8_blocks(32), description)
    settings = [*SETTINGS, *(word for word in small if word != "--set")] if recipe != "rtn-w4" else SETTINGS
    plan = make_plan(open_checkpoint(str(pair.compressed)), load(recipe, settings))
    assert any("keeps the codes and scales of the source" in note for note in plan.notes)
    report = quantize(plan, tmp_path / "out")
    check_kept(pair.compressed, tmp_path / "out", "_scale_inv")
    assert {row.method for row in report.rows if ".mlp." in row.site} == {"stored"}
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    blocks = [group for group in said["config_groups"].values() if group["weights"]["strategy"] == "block"]
    assert blocks[0]["weights"]["block_structure"] == [32, 32] and blocks[0]["input_activations"]["dynamic"] is True


def test_fp8_rows_stay(tiny_llama, tmp_path):
    pair = write_pair(tiny_llama, tmp_path, fp8_scaled("channel"), {"quant_method": "fbgemm_fp8"})
    quantize(make_plan(open_checkpoint(str(pair.compressed)), load("rtn-w4", SETTINGS)), tmp_path / "out")
    check_kept(pair.compressed, tmp_path / "out", "_scale")


@pytest.mark.parametrize("before", ["rtn-w8", "w8a8-dynamic", "fp8-dynamic", "nvfp4", "mxfp4", "rtn-w4"])
def test_codes_of_compressed_tensors_stay(before, tiny_llama, small, tmp_path):
    settings = ["quantize.group_size=32"] if before == "rtn-w4" else []
    settings += [word for word in small if word != "--set"] if load(before).calibration else []
    quantize(make_plan(open_checkpoint(str(tiny_llama)), load(before, settings)), tmp_path / "source")
    recipe = load("rtn-w4", [*SETTINGS, "quantize.bits=3"])
    plan = make_plan(open_checkpoint(str(tmp_path / "source")), recipe)
    quantize(plan, tmp_path / "out")
    check_kept(tmp_path / "source", tmp_path / "out", "_scale")


def test_other_formats_and_recipes_with_transforms_decode_what_is_left_alone(tiny_llama, tmp_path):
    description = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    pair = write_pair(tiny_llama, tmp_path, fp8_blocks(32), description)
    for recipe, settings in (("rtn-w4", ["export.format=gptq"]), ("awq-gptq-w4", [])):
        plan = make_plan(open_checkpoint(str(pair.compressed)), load(recipe, [*SETTINGS, *settings]))
        assert not plan.taken_over and any("decoded to bfloat16" in note for note in plan.notes)
