"""What a config calls quantized is what the file holds quantized; plans and hints say what is true of clients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.core.errors import OutputError, SourceError
from outlierq.load import open_checkpoint
from outlierq.pipeline.checking.written import check_written
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import EXTRA_KEPT
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

FORMATS = {
    "compressed-tensors": ("rtn-w4", ["quantize.group_size=32"]),
    "awq": ("rtn-w4", ["quantize.group_size=32", "export.format=awq"]),
    "gptq": ("rtn-w4", ["quantize.group_size=32", "export.format=gptq"]),
    "bitsandbytes": ("llm-int8", []),
}
UNKNOWN = ("mtp.layers.0.mlp.up_proj", "visual.merger.linear_fc1")


@pytest.fixture(scope="module")
def larger_than_its_class(tools, tmp_path_factory) -> Path:
    """A model with matrices that its class does not know: of a further block, and of a vision tower. Read-only."""
    folder = tools.write_llama(tmp_path_factory.mktemp("larger") / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{name}.weight": torch.randn(64, 64).bfloat16() for name in UNKNOWN}
    tensors["visual.pos_embed.weight"] = torch.randn(16, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def kept_by(config: dict) -> str:
    """Everything that a quantization_config names as not quantized."""
    keys = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules", "dynamic")
    return json.dumps([config.get(key) for key in keys]).replace("\\", "")


@pytest.mark.parametrize("form", FORMATS)
def test_every_matrix_that_is_stored_plain_is_named_whether_the_class_knows_it_or_not(
    form, larger_than_its_class, tmp_path
):
    name, settings = FORMATS[form]
    quantize(make_plan(open_checkpoint(str(larger_than_its_class)), load(name, settings)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    said = kept_by(config)
    assert all(module in said for module in UNKNOWN) and "pos_embed" not in said
    assert not [fault for fault in verify(str(tmp_path / "out")).faults if fault.check == "config"]


def test_the_plan_has_a_row_and_a_sentence_for_each_part_that_the_class_does_not_know(larger_than_its_class):
    plan = make_plan(open_checkpoint(str(larger_than_its_class)), load("rtn-w8", []))
    rows = {row.sites: row for row in plan.rows}
    assert (rows["mtp.*"].count, rows["visual.*"].count) == (1, 2)
    assert rows["mtp.*"].source_bytes == rows["mtp.*"].output_bytes == 2 * 64 * 64
    assert sum(row.source_bytes for row in plan.rows) == plan.source_bytes
    said = [note for note in plan.notes if note.startswith("mtp.*")]
    share = 64 * 64 / plan.parameters
    assert said == [f"mtp.* (1 tensors, {share:.1%} of the parameters): {EXTRA_KEPT}"]


def test_a_plain_matrix_that_is_declared_quantized_is_found_without_its_class(larger_than_its_class, tmp_path):
    out = tmp_path / "out"
    quantize(make_plan(open_checkpoint(str(larger_than_its_class)), load(*FORMATS["compressed-tensors"])), out)
    content = json.loads((out / "config.json").read_text())
    content["quantization_config"]["ignore"].remove(UNKNOWN[0])
    (out / "config.json").write_text(json.dumps(content))
    assert ("config", UNKNOWN[0]) in {(fault.check, fault.tensor) for fault in verify(str(out)).faults}
    content["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (out / "config.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match="stored otherwise than"):
        check_written(out, open_checkpoint(str(larger_than_its_class)))


def test_towers_stay_in_16_bits_unless_an_override_names_them():
    plain = load("rtn-w4", []).quantize
    module, tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.vision_tower"
    assert plain.protects(module, tower) and plain.protects("model.connector.linear", "model.connector")
    assert plain.ignores("lm_head") and not plain.protects("model.layers.0.image_gate")
    for word in ("vision", "vision_tower"):
        named = load("rtn-w4", [f"quantize.overrides=[{{match: '*{word}*', bits: 8}}]"]).quantize
        assert not named.protects(module, tower)
    assert not load("rtn-w4", ["quantize.overrides=[{match: '*connector*', bits: 8}]"]).quantize.protects(
        "model.connector.linear", "model.connector"
    )


def test_what_vllm_merges_must_share_one_scheme_and_widths_must_fill_words(tiny_llama, tools, tmp_path):
    def line(source, *settings):
        plan = make_plan(open_checkpoint(str(source)), load("rtn-w4", ["quantize.group_size=32", *settings]))
        return next(line for line in plan.clients if line.startswith("vLLM"))

    assert line(tiny_llama).endswith("loads")
    assert line(tiny_llama, "quantize.overrides=[{match: 'model.layers.0.*', group_size: 16}]").endswith("loads")
    apart = line(tiny_llama, "quantize.overrides=[{match: '*q_proj', group_size: 16}]")
    assert "does not load it: it merges q_proj and k_proj and v_proj of model.layers.0.self_attn" in apart
    kept = line(tiny_llama, "quantize.overrides=[{match: '*gate_proj', keep: true}]")
    assert "gate_proj 16 bits" in kept
    narrow = tools.write_llama(tmp_path / "narrow", intermediate_size=100)
    wide = "quantize.overrides=[{match: '*gate_proj', keep: true}, {match: '*up_proj', keep: true}]"
    assert "gate_proj and up_proj of model.layers.0.mlp have 200 rows, no multiple of 32" in line(
        narrow, "quantize.when_indivisible=per-channel"
    )
    said = line(narrow, "quantize.when_indivisible=per-channel", wide)
    assert "down_proj has 100 columns, no multiple of 8" in said


@pytest.mark.parametrize("method", ["fp8", "torchao", "hqq"])
def test_a_plain_checkpoint_that_calls_itself_compressed_is_refused(method, llama_copy):
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(SourceError) as caught:
        make_plan(open_checkpoint(str(llama_copy)), load("rtn-w4", []))
    assert "compressed" in caught.value.what and "--format" not in (caught.value.hint or "")


def test_what_other_programs_leave_is_called_by_its_name(llama_copy, tmp_path):
    config = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4, "group_size": 64}}))
    with pytest.raises(SourceError, match="compressed with mlx"):
        make_plan(open_checkpoint(str(llama_copy)), load("rtn-w4", []))
    (llama_copy / "config.json").write_text(json.dumps(config))
    tensors = load_file(llama_copy / "model.safetensors")
    for prefix, wrapper in {"module.": "DataParallel", "_orig_mod.": "torch.compile"}.items():
        renamed = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        save_file(renamed, llama_copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(SourceError) as caught:
            make_plan(open_checkpoint(str(llama_copy)), load("rtn-w4", []))
        assert wrapper in caught.value.hint and prefix in caught.value.hint
    (llama_copy / "quantize_config.json").write_text("{}")
    with pytest.raises(SourceError) as caught:
        make_plan(open_checkpoint(str(llama_copy)), load("rtn-w4", []))
    assert "AutoGPTQ" in caught.value.hint
