"""Checkpoints of ModelOpt, AutoRound, bitsandbytes, MLX, gpt-oss: what they serve is what is compressed."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_sources import (
    awq_layout,
    edit_tensors,
    four_bit,
    fp8_blocks,
    fp8_scaled,
    gptq_layout,
    mlx,
    modelopt_nvfp4,
    mxfp4_experts,
    weight_files,
    write_pair,
)
from safetensors.torch import load_file

from outlierq.core.errors import SourceError
from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
FORMS = {
    "ModelOpt FP8": (fp8_scaled("tensor", inputs=True), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ModelOpt FP8 in blocks": (
        fp8_blocks(128, suffix="weight_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
    ),
    "ModelOpt NVFP4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}),
    "AutoRound": (gptq_layout(32, less=0), {**ROUND, "packing_format": "auto_round"}),
    "AutoRound as GPTQ": (gptq_layout(32, less=1), {**ROUND, "packing_format": "auto_round:auto_gptq"}),
    "AutoRound as AWQ": (awq_layout(32), {**ROUND, "packing_format": "auto_round:auto_awq"}),
    "GPTQ": (gptq_layout(32, less=1, index=True), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "AWQ": (awq_layout(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "MLX in 4 bits": (mlx(4, 32), {"bits": 4, "group_size": 32}),
    "MLX in 3 bits": (mlx(3, 32), {"bits": 3, "group_size": 32}),
    "MLX in 8 bits": (mlx(8, 32), {"bits": 8, "group_size": 32}),
    "Metal": (mlx(4, 32, biases="qbiases"), {"quant_method": "metal", "bits": 4, "group_size": 32}),
    "bitsandbytes nf4": (four_bit(), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes nf4, nested": (four_bit(nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes fp4": (four_bit("fp4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}
# The tensor that scales a weight, by its ending.
SCALES = ("weight_scale", "weight_scale_2", "scales", "absmax", "biases", "qbiases")
NAME = "model.layers.1.mlp.up_proj"


def made(form, plain, out):
    """A pair of this form; MLX writes `quantization`."""
    coder, description = FORMS[form]
    key = "quantization_config" if "quant_method" in description else "quantization"
    return write_pair(plain, out, coder, description, key=key)


@pytest.mark.parametrize("form", FORMS)
def test_the_result_is_that_of_its_exact_dequantization(form, tiny_llama, tmp_path):
    pair = made(form, tiny_llama, tmp_path)
    quantize(make_plan(open_checkpoint(str(pair.compressed)), load("dense")), tmp_path / "plain")
    found, expected = load_file(tmp_path / "plain" / "model.safetensors"), load_file(pair.dense / "model.safetensors")
    assert found.keys() == expected.keys() and len(unpacked(open_checkpoint(str(pair.compressed))).packed) == 14
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for name, source in (("a", pair.compressed), ("b", pair.dense)):
        quantize(make_plan(open_checkpoint(str(source)), load("rtn-w4", ["quantize.group_size=32"])), tmp_path / name)
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")
    for result in ("a", "plain"):
        assert verify(str(tmp_path / result), str(pair.compressed)).faults == []


@pytest.mark.parametrize("form", FORMS)
def test_it_is_measured_checked_and_looked_at(form, tiny_llama, outlierq, tmp_path):
    pair = made(form, tiny_llama, tmp_path)
    assert verify(str(pair.compressed)).faults == []
    inspected = json.loads(outlierq("inspect", pair.compressed, "--json").out)
    dense = json.loads(outlierq("inspect", pair.dense, "--json").out)
    assert inspected["parameters"] == dense["parameters"] and inspected["quantization"]
    same = json.loads(outlierq("diff", pair.compressed, pair.dense, "--json").out)
    assert same["changed"] == same["added"] == same["removed"] == []
    measured = outlierq("eval", pair.compressed, "--windows", "2", "--window-length", "64")
    assert measured.code == 0, measured.err


@pytest.mark.parametrize("form", FORMS)
def test_scales_that_are_no_numbers_are_refused_before_anything_is_written(form, tiny_llama, outlierq, tmp_path):
    folder = made(form, tiny_llama, tmp_path).compressed

    def damage(tensors):
        name = next(n for n in tensors if n.startswith(f"{NAME}.") and n.endswith(SCALES))
        if tensors[name].dtype == torch.uint8:
            name = f"{NAME}.weight.nested_absmax"
        tensors[name] = tensors[name].float().reshape(-1).index_fill(0, torch.tensor([0]), float("nan")).to(
            tensors[name].dtype
        ).reshape(tensors[name].shape)  # fmt: skip

    edit_tensors(folder, damage)
    done = outlierq("quantize", folder, "-r", "rtn-w8", "-o", tmp_path / "out", "-q")
    assert done.code == 1 and ("no numbers" in done.err or "numbers, first nan" in done.err or "NaN" in done.err)
    assert not list(tmp_path.glob("out*")), done.err


@pytest.mark.parametrize("form", FORMS)
def test_a_lost_part_and_a_plain_weight_among_others_are_refused(form, tiny_llama, tmp_path):
    pair = made(form, tiny_llama, tmp_path)
    parts = [n for n in load_file(pair.compressed / "model.safetensors") if n.startswith(f"{NAME}.")]
    needed = [n for n in parts if not n.endswith(("input_scale", "g_idx"))]
    assert len(needed) >= 2
    for part in needed:
        edit_tensors(pair.compressed, lambda tensors, part=part: tensors.pop(part))
        with pytest.raises(SourceError, match=r"mixed|has no|lacks"):
            make_plan(open_checkpoint(str(pair.compressed)), load("rtn-w8"))
        made_again = made(form, tiny_llama, tmp_path / part)
        (pair.compressed / "model.safetensors").write_bytes((made_again.compressed / "model.safetensors").read_bytes())
    plain = {f"{NAME}.weight": load_file(pair.dense / "model.safetensors")[f"{NAME}.weight"]}
    edit_tensors(pair.compressed, lambda tensors: ([tensors.pop(n) for n in parts], tensors.update(plain)))
    with pytest.raises(SourceError, match="is mixed") as caught:
        make_plan(open_checkpoint(str(pair.compressed)), load("rtn-w8"))
    assert NAME in caught.value.what


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_another_shape_or_dtype_are_refused(form, tiny_llama, tmp_path):
    folder = made(form, tiny_llama, tmp_path).compressed
    whole = (folder / "model.safetensors").read_bytes()
    parts = [n for n in load_file(folder / "model.safetensors") if n.startswith(f"{NAME}.")]
    tried = 0
    for part in parts:
        if part.endswith(("g_idx", "input_scale")) or "quant_state" in part:
            continue
        for change in (lambda t: torch.cat([t, t]) if t.ndim else torch.stack([t, t, t]), lambda t: t.to(torch.int16)):
            (folder / "model.safetensors").write_bytes(whole)
            edit_tensors(folder, lambda tensors, p=part, c=change: tensors.update({p: c(tensors[p]).contiguous()}))
            with pytest.raises(SourceError):
                make_plan(open_checkpoint(str(folder)), load("rtn-w8"))
            tried += 1
    assert tried >= 4


def test_modelopt_is_known_by_its_own_file_alone(tiny_llama, tmp_path):
    coder, description = FORMS["ModelOpt NVFP4"]
    pair = write_pair(tiny_llama, tmp_path, coder, None)
    said = {"quant_algo": description["quant_algo"], "group_size": 16, "exclude_modules": ["lm_head"]}
    (pair.compressed / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": said})
    )
    quantize(make_plan(open_checkpoint(str(pair.compressed)), load("dense")), tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(pair.dense / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_factors_for_inputs_are_refused(tiny_llama, tmp_path):
    coder, description = FORMS["ModelOpt NVFP4"]
    extra = {f"{NAME}.pre_quant_scale": torch.ones(64)}
    pair = write_pair(tiny_llama, tmp_path, coder, description, extra=extra)
    with pytest.raises(SourceError, match="multiplies inputs while it runs"):
        make_plan(open_checkpoint(str(pair.compressed)), load("rtn-w8"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory, tools):
    """A plain gpt-oss of two blocks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path_factory.mktemp("gpt_oss")
    torch.manual_seed(2)
    config = GptOssConfig(
        vocab_size=260, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        rope_parameters=None, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tools.write_tokenizer(folder)
    return folder


def experts_of(plain, out):
    """The same with MXFP4 experts."""
    description = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    return write_pair(
        plain, out, mxfp4_experts, description, chosen=lambda name: name.endswith(("gate_up_proj", "down_proj"))
    )


def test_experts_in_mxfp4_are_what_transformers_makes_of_them(gpt_oss, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pair = experts_of(gpt_oss, tmp_path)
    stored = load_file(pair.compressed / "model.safetensors")
    plain = unpacked(open_checkpoint(str(pair.compressed)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    reference = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert torch.equal(plain.read(name).to(torch.bfloat16), reference)
    assert torch.equal(plain.read(name), reference.float())
    assert torch.equal(plain.read_some_rows(name, [2, 0]).to(torch.bfloat16), reference[[2, 0]])
    quantize(make_plan(open_checkpoint(str(pair.compressed)), load("dense")), tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(pair.dense / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    assert verify(str(tmp_path / "out"), str(pair.compressed)).faults == []
    assert verify(str(pair.compressed)).faults == []


def test_a_result_from_mxfp4_experts_is_that_from_the_plain_ones(gpt_oss, tmp_path):
    pair = experts_of(gpt_oss, tmp_path)
    for name, source in (("a", pair.compressed), ("b", pair.dense)):
        quantize(make_plan(open_checkpoint(str(source)), load("rtn-w4", ["quantize.group_size=32"])), tmp_path / name)
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")


@pytest.mark.parametrize("damage", ["NaN", "zeros", "lost", "shape"])
def test_damaged_mxfp4_experts_are_refused(damage, gpt_oss, outlierq, tmp_path):
    folder, name = experts_of(gpt_oss, tmp_path).compressed, "model.layers.0.mlp.experts.down_proj"

    def change(tensors):
        scales = f"{name}_scales"
        if damage == "NaN":
            tensors[scales][1, 2, 0] = 255
        elif damage == "zeros":
            tensors[scales].zero_()
        elif damage == "lost":
            del tensors[scales]
        else:
            tensors[scales] = tensors[scales][:, :-1].contiguous()

    edit_tensors(folder, change)
    done = outlierq("quantize", folder, "-r", "dense", "-o", tmp_path / "out", "-q")
    assert done.code == 1 and name in done.err and "hint: " in done.err and not list(tmp_path.glob("out*"))
