"""FP8 checkpoints of other programs: what they serve is what every command sees, and damaged ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_sources import edit_config, edit_tensors, fp8_blocks, fp8_scaled, weight_files, write_pair
from safetensors.torch import load_file

from outlierq.core.errors import SourceError
from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
FORMS = {
    "blocks of 32": (fp8_blocks(32), {**BLOCKS, "weight_block_size": [32, 32]}),
    "ragged blocks": (fp8_blocks(40), {**BLOCKS, "weight_block_size": [40, 40]}),
    "blocks of 128, larger than the weights": (fp8_blocks(128), {**BLOCKS, "weight_block_size": [128, 128]}),
    "bfloat16 scales": (fp8_blocks(32, dtype="bfloat16"), {**BLOCKS, "weight_block_size": [32, 32]}),
    "exponents": (
        fp8_blocks(32, powers=True, dtype="float8_e8m0fnu"),
        {**BLOCKS, "scale_fmt": "ue8m0", "weight_block_size": [32, 32]},
    ),
    "one scale": (fp8_scaled("tensor"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "one scale, fixed inputs": (
        fp8_scaled("tensor", inputs=True),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fbgemm": (fp8_scaled("channel"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, tools):
    """A dense Qwen3 of two blocks."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tools.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pair(qwen, tmp_path_factory):
    """An FP8 Qwen3 in blocks of 32, and its exact dequantization."""
    return write_pair(qwen, tmp_path_factory.mktemp("pair"), *FORMS["blocks of 32"])


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_checkpoint_of_it_holds_code_times_scale_rounded_once(form, qwen, tmp_path):
    pair = write_pair(qwen, tmp_path, *FORMS[form])
    quantize(make_plan(open_checkpoint(str(pair.compressed)), load("dense")), tmp_path / "out")
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(pair.dense / "model.safetensors")
    assert found.keys() == expected.keys() and len(found) > 20
    for name, tensor in expected.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(found[name], tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert verify(str(tmp_path / "out"), str(pair.compressed)).sound


@pytest.mark.parametrize("recipe", ["rtn-w4", "awq-gptq-w4", "fp8-dynamic", "nvfp4"])
def test_the_result_is_that_of_its_exact_dequantization_byte_for_byte(recipe, pair, outlierq, small, tmp_path):
    for name, source in (("a", pair.compressed), ("b", pair.dense)):
        words = ("-r", recipe, *small, "--set", "quantize.ignore=[lm_head]", "-o", tmp_path / name, "-q")
        done = outlierq("quantize", source, *words)
        assert done.code == 0, done.err
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b")
    verified = verify(str(tmp_path / "a"), str(pair.compressed))
    assert verified.sound and len(verified.errors) == 14, verified.faults


def test_every_command_takes_it(pair, outlierq, tmp_path):
    planned = json.loads(outlierq("plan", pair.compressed, "-r", "rtn-w8", "--json").out)
    assert any("decoded to bfloat16" in note for note in planned["notes"])
    stored = sum(t.nbytes for t in open_checkpoint(str(pair.compressed)).tensors.values())
    assert planned["source_bytes"] == stored
    inspected = json.loads(outlierq("inspect", pair.compressed, "--json").out)
    assert inspected["quantization"] == "fp8" and 8 < inspected["quantized_bits_per_weight"] < 8.1
    for words in (
        ("calibrate", pair.compressed, "--samples", "4", "--sequence-length", "32", "-o", tmp_path / "stats"),
        ("detect", pair.compressed, "--stats", tmp_path / "stats"),
        ("compare", pair.compressed, pair.dense),
        ("verify", pair.compressed),
        ("eval", pair.compressed, "--reference", pair.dense, "--windows", "2", "--window-length", "64"),
    ):
        done = outlierq(*words)
        assert done.code == 0, (words, done.err, done.out)
    same = json.loads(outlierq("diff", pair.compressed, pair.dense, "--json").out)
    assert same["changed"] == [] and same["equal"] > 20


def test_a_model_of_it_rounds_inputs_as_the_checkpoint_says(pair):
    from outlierq.load import load_model

    model = load_model(open_checkpoint(str(pair.compressed)))
    hooks = [name for name, part in model.named_modules() if part._forward_pre_hooks]
    assert len(hooks) == 14


DAMAGE = {
    "NaN": lambda scale: scale.view(-1)[0].fill_(float("nan")),
    "zero": lambda scale: scale.view(-1)[1].fill_(0),
    "negative": lambda scale: scale.view(-1)[1].neg_(),
    "infinite": lambda scale: scale.view(-1)[1].fill_(float("inf")),
}
SCALE = "model.layers.1.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize("damage", DAMAGE)
def test_scales_that_are_none_are_refused_before_anything_is_written(damage, qwen, outlierq, tmp_path):
    folder = write_pair(qwen, tmp_path, *FORMS["blocks of 32"]).compressed
    edit_tensors(folder, lambda tensors: DAMAGE[damage](tensors[SCALE]))
    for words in (("-r", "rtn-w4"), ("-r", "dense")):
        done = outlierq("quantize", folder, *words, "-o", tmp_path / "out", "-q")
        assert done.code == 1 and "scales of model.layers.1.mlp.up_proj.weight" in done.err
        assert not list(tmp_path.glob("out*"))


def test_a_weight_of_zeros_may_have_scales_of_zero(qwen, tmp_path):
    folder = write_pair(qwen, tmp_path, *FORMS["blocks of 32"]).compressed

    def clear(tensors):
        tensors[SCALE].zero_()
        tensors[SCALE.removesuffix("_scale_inv")].zero_()

    edit_tensors(folder, clear)
    assert not unpacked(open_checkpoint(str(folder))).read(SCALE.removesuffix("_scale_inv")).any()


def test_scales_of_another_shape_are_refused(qwen, outlierq, tmp_path):
    folder = write_pair(qwen, tmp_path, *FORMS["blocks of 32"]).compressed
    edit_tensors(folder, lambda tensors: tensors.update({SCALE: tensors[SCALE][:, :1].clone()}))
    said = outlierq("plan", folder, "-r", "rtn-w4")
    assert said.code == 1 and "3 x 2 blocks of 32 x 32" in said.err and "weight_block_size" in said.err


def test_a_mixed_checkpoint_is_refused_and_the_hint_works(qwen, outlierq, tmp_path):
    pair = write_pair(qwen, tmp_path, *FORMS["blocks of 32"])
    name = SCALE.removesuffix("_scale_inv")

    def plain(tensors):
        tensors[name] = load_file(pair.dense / "model.safetensors")[name]
        del tensors[SCALE]

    edit_tensors(pair.compressed, plain)
    said = outlierq("plan", pair.compressed, "-r", "rtn-w4")
    assert said.code == 1 and f"is mixed: {name}" in said.err and "modules_to_not_convert" in said.err
    description = {**FORMS["blocks of 32"][1], "modules_to_not_convert": [name.removesuffix(".weight")]}
    edit_config(pair.compressed, quantization_config=description)
    assert outlierq("plan", pair.compressed, "-r", "rtn-w4").code == 0


@pytest.mark.parametrize("lost", [SCALE, SCALE.removesuffix("_scale_inv")])
def test_a_weight_without_scales_and_scales_without_a_weight_are_refused(lost, qwen, tmp_path):
    folder = write_pair(qwen, tmp_path, *FORMS["blocks of 32"]).compressed
    edit_tensors(folder, lambda tensors: tensors.pop(lost))
    with pytest.raises(SourceError, match=r"is mixed|lacks|has no"):
        make_plan(open_checkpoint(str(folder)), load("rtn-w4"))


@pytest.mark.parametrize(
    "change", [{"weight_block_size": [0, 32]}, {"weight_block_size": "x"}, {"modules_to_not_convert": [3]}]
)
def test_a_description_of_other_types_is_refused(change, qwen, tmp_path):
    coder, description = FORMS["blocks of 32"]
    folder = write_pair(qwen, tmp_path, coder, {**description, **change}).compressed
    with pytest.raises(SourceError, match="quantization_config"):
        make_plan(open_checkpoint(str(folder)), load("rtn-w4"))
