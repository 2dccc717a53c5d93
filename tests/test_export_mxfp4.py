"""Experts as gpt-oss is published: what is written, what transformers makes of it, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import outlierq
from outlierq.core.errors import OutputError, RecipeError
from outlierq.core.model import Piece
from outlierq.export.layout import OutputTensor, make_layout
from outlierq.export.writer import ShardWriter
from outlierq.load import open_checkpoint, served
from outlierq.load.model.experts.apart import as_stored
from outlierq.pipeline.ledger.stacks import Stacks
from outlierq.pipeline.planning.decide import make_plan
from outlierq.recipe import load

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from coverage_models import tiny_model, write_checkpoint

EXPORT = {"export.format": "mxfp4"}
SEQUENTIAL = {
    "quantize.method": "gptq",
    "quantize.scale_search": "minmax",
    "calibration.samples": 4,
    "calibration.sequence_length": 32,
}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    """A tiny gpt-oss in bfloat16; read-only."""
    folder = tmp_path_factory.mktemp("gpt_oss") / "source"
    write_checkpoint(tiny_model("gpt_oss", "text"), folder)
    return folder


def written(source: Path, out: Path, **settings) -> Path:
    outlierq.quantize(source, "mxfp4", out=out, settings=EXPORT | settings, device="cpu")
    return out


def test_blocks_and_scales_have_the_names_shapes_and_config_of_the_published_model(gpt_oss, tmp_path):
    out = written(gpt_oss, tmp_path / "out")
    tensors, experts = outlierq.open(out).tensors, "model.layers.0.mlp.experts"
    shapes = {name: tensors[f"{experts}.{name}"].shape for name in ("gate_up_proj_blocks", "gate_up_proj_scales")}
    assert shapes == {"gate_up_proj_blocks": (4, 512, 4, 16), "gate_up_proj_scales": (4, 512, 4)}
    assert tensors[f"{experts}.gate_up_proj_bias"].shape == (4, 512)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "BF16"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4" and "lm_head" in config["modules_to_not_convert"]
    assert not outlierq.verify(out, gpt_oss).faults


def test_transformers_decodes_every_tensor_to_what_outlierq_decodes(gpt_oss, tmp_path):
    from transformers import AutoModelForCausalLM

    out = written(gpt_oss, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    parameters, plain = dict(model.named_parameters()), as_stored(served(open_checkpoint(str(out))))
    assert plain.tensors and all(torch.equal(plain.read(name), parameters[name]) for name in plain.tensors)


def test_a_plan_that_leaves_experts_in_16_bits_says_first_which_commands_quantize_them(gpt_oss):
    plan = make_plan(open_checkpoint(str(gpt_oss)), load("rtn-w8"))
    assert plan.notes[0].startswith("only 11% of the weights") and "mlp.experts stays in one tensor" in plan.notes[1]
    offered = "`-r mxfp4 --set export.format=mxfp4` for transformers and vLLM, `-r gguf-q4_k_m` for llama.cpp"
    assert offered in plan.notes[1]
    for recipe, settings in (("mxfp4", ["export.format=mxfp4"]), ("gguf-q4_k_m", [])):
        other = make_plan(open_checkpoint(str(gpt_oss)), load(recipe, settings))
        assert all(p.scheme is not None for p in other.sites if p.site.expert) and other.quantized_share > 0.85


@pytest.mark.parametrize(("name", "offers"), [("aria_text", False), ("llama4_text", True)])
def test_other_classes_are_held_where_their_tensors_are_called_so_and_are_decoded_by_transformers(
    name, offers, tmp_path
):
    from transformers import AutoModelForCausalLM

    write_checkpoint(tiny_model(name, "text"), tmp_path / name)
    if not offers:
        assert "-r mxfp4" not in " ".join(make_plan(open_checkpoint(str(tmp_path / name)), load("rtn-w8")).notes)
        with pytest.raises(RecipeError, match="quantizes none"):
            make_plan(open_checkpoint(str(tmp_path / name)), load("mxfp4", ["export.format=mxfp4"]))
        return
    out = written(tmp_path / name, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["dequantize"] is True
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    plain = as_stored(served(open_checkpoint(str(out))))
    names = [tensor for tensor in plain.tensors if "experts.gate_up" in tensor]
    assert names and all(torch.equal(plain.read(tensor), model.get_parameter(tensor)) for tensor in names)


def test_what_lies_on_the_grid_already_is_written_bit_for_bit(gpt_oss, tmp_path):
    first = written(gpt_oss, tmp_path / "first")
    again = as_stored(served(open_checkpoint(str(written(first, tmp_path / "again")))))
    plain = as_stored(served(open_checkpoint(str(first))))
    assert all(torch.equal(plain.read(name), again.read(name)) for name in plain.tensors)


def test_written_blocks_are_read_back_for_the_blocks_after_them(gpt_oss, tmp_path):
    out = written(gpt_oss, tmp_path / "out", **SEQUENTIAL, **{"calibration.mode": "sequential"})
    assert not outlierq.verify(out, gpt_oss).faults


def test_experts_of_a_block_are_all_quantized_or_none(gpt_oss):
    recipe = load("mxfp4", ["export.format=mxfp4", "quantize.ignore=[lm_head, '*.experts.1.down_proj']"])
    with pytest.raises(RecipeError, match=r"experts of model\.layers\.0\.mlp\.experts in one tensor"):
        make_plan(open_checkpoint(str(gpt_oss)), recipe)


def test_a_model_without_such_experts_and_other_numbers_are_refused(tmp_path):
    write_checkpoint(tiny_model("llama", "text"), tmp_path / "llama")
    with pytest.raises(RecipeError, match="mxfp4 holds experts that the source has in one tensor, and nothing else"):
        make_plan(open_checkpoint(str(tmp_path / "llama")), load("mxfp4", ["export.format=mxfp4"]))
    with pytest.raises(RecipeError, match="mxfp4 stores 4-bit floats with a power of two for 32 columns"):
        load("rtn-w4", ["export.format=mxfp4"])


def test_an_expert_is_written_when_its_last_part_is_there_in_any_order(tmp_path):
    layout = make_layout([OutputTensor("stack", "U8", (2, 4, 3), "block-00000")], 1 << 20)
    writer = ShardWriter(tmp_path, layout)
    values = torch.arange(24, dtype=torch.uint8).view(2, 4, 3)
    stacks, digests = Stacks(writer), {}
    for expert in (1, 0):
        for rows in (slice(1, None, 2), slice(0, None, 2)):
            assert not digests
            piece = Piece("stack", "experts", expert, rows, False, (2, 4, 3))
            digests = stacks.put("stack", piece, values[expert, rows])
    assert digests == {"stack": writer.digest("stack")}
    assert b"".join(writer.read("stack")) == values.numpy().tobytes()
    with pytest.raises(OutputError):
        stacks.put("stack", Piece("stack", "experts", 2, slice(0, 4), False, (2, 4, 3)), values[0])
    writer.close()
