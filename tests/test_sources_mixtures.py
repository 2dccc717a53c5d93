"""Mixtures that are published with their experts alone compressed (Kimi K2 in int4): decoded, kept, or told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from compressed_sources import edit_config, pack_quantized, weight_files, write_pair
from safetensors.torch import load_file

from outlierq.core.errors import SourceError
from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from coverage_models import tiny_model, write_checkpoint

WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
KIMI_K2 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
}


def is_expert(name: str) -> bool:
    """Whether a tensor is a weight of one of the experts that a router chooses."""
    return ".experts." in name and name.endswith("proj.weight")


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """A tiny DeepSeek-V3, of which Kimi K2 is one, with experts in int4, and what it serves; read-only."""
    folder = tmp_path_factory.mktemp("kimi")
    write_checkpoint(tiny_model("deepseek_v3", "text"), folder / "plain")
    return write_pair(folder / "plain", folder, pack_quantized(32), KIMI_K2, chosen=is_expert)


def test_experts_in_int4_beside_plain_linears_serve_what_their_dequantization_holds(kimi):
    plain, expected = unpacked(open_checkpoint(str(kimi.compressed))), load_file(kimi.dense / "model.safetensors")
    assert set(plain.packed) == {name for name in expected if is_expert(name)} and len(plain.packed) > 8
    for name, tensor in expected.items():
        assert torch.equal(plain.read(name).to(tensor.dtype), tensor), name


def test_a_result_from_them_is_byte_for_byte_that_from_the_plain_ones(kimi, tmp_path):
    for name, source in (("a", kimi.compressed), ("b", kimi.dense)):
        quantize(make_plan(open_checkpoint(str(source)), load("rtn-w8")), tmp_path / name)
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")
    assert verify(str(tmp_path / "a"), str(kimi.compressed)).faults == []


def test_experts_that_a_recipe_leaves_alone_keep_their_codes_byte_for_byte(kimi, tmp_path):
    recipe = load("rtn-w8", ["quantize.ignore=[lm_head, '*.experts.*']"])
    quantize(make_plan(open_checkpoint(str(kimi.compressed)), recipe), tmp_path / "out")
    stored, kept = load_file(kimi.compressed / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    codes = [name for name in stored if ".experts." in name and name.endswith(("weight_packed", "weight_scale"))]
    assert codes and all(torch.equal(stored[name], kept[name]) for name in codes)
    assert kept["model.layers.0.self_attn.o_proj.weight_packed"].dtype == torch.int32


def test_a_plain_expert_among_packed_ones_is_told(kimi, tmp_path):
    pair = write_pair(
        kimi.dense, tmp_path, pack_quantized(32), KIMI_K2, chosen=lambda name: is_expert(name) and ".0.up" not in name
    )
    with pytest.raises(SourceError, match="is mixed"):
        make_plan(open_checkpoint(str(pair.compressed)), load("rtn-w8"))


def test_an_unknown_scheme_of_the_experts_is_refused(kimi, tmp_path):
    pair = write_pair(kimi.dense, tmp_path, pack_quantized(32), KIMI_K2, chosen=is_expert)
    group = {"targets": ["Linear"], "weights": WEIGHTS | {"num_bits": 5.5}}
    edit_config(pair.compressed, quantization_config=KIMI_K2 | {"config_groups": {"group_0": group}})
    with pytest.raises(SourceError):
        make_plan(open_checkpoint(str(pair.compressed)), load("rtn-w8"))
