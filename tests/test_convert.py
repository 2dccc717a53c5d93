"""A compressed checkpoint is written in another format with the same numbers, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from outlierq.core.errors import RecipeError, SourceError
from outlierq.load import open_checkpoint, unpacked
from outlierq.pipeline.convert import convert, make_conversion
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

FORMS = ("compressed-tensors", "awq", "gptq", "gptq-v2")


def compressed(source: Path, out: Path, form: str, *settings: str, recipe: str = "rtn-w4") -> Path:
    chosen = load(recipe, [f"export.format={form}", *settings])
    quantize(make_plan(open_checkpoint(str(source)), chosen), out)
    return out


def check_equal(one: Path, other: Path) -> None:
    """The same tensors with the same decoded numbers."""
    first, second = unpacked(open_checkpoint(str(one))), unpacked(open_checkpoint(str(other)))
    assert first.tensors.keys() == second.tensors.keys() and len(first.linears) == len(second.linears) >= 14
    for name in first.tensors:
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("before", FORMS)
def test_every_format_becomes_every_other_one_with_the_same_numbers(before, symmetric, tiny_llama, tmp_path):
    settings = ["quantize.group_size=32", f"quantize.symmetric={symmetric}"]
    source = compressed(tiny_llama, tmp_path / "source", before, *settings)
    for after in FORMS:
        out = tmp_path / after
        plan = make_conversion(open_checkpoint(str(source)), after)
        report = convert(plan, out)
        check_equal(source, out)
        assert verify(str(out), str(tiny_llama)).sound
        written = sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json")
        assert report.output_bytes == written == plan.output_bytes
        assert {row.symmetric for row in report.rows} == {symmetric == "true"} and len(report.rows) == 14
        assert 0.7 < report.source_bytes / sum(p.stat().st_size for p in source.glob("*.safetensors")) <= 1


def test_there_and_back_gives_the_same_weight_file(tiny_llama, tmp_path):
    source = compressed(tiny_llama, tmp_path / "a", "gptq", "quantize.group_size=32", "quantize.symmetric=false")
    convert(make_conversion(open_checkpoint(str(source)), "awq"), tmp_path / "b")
    convert(make_conversion(open_checkpoint(str(tmp_path / "b")), "gptq"), tmp_path / "c")
    for name in ("model.safetensors", "config.json"):
        assert (source / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_what_cannot_be_exact_is_refused_before_anything_is_written(tiny_llama, untied_llama, tmp_path):
    eight = compressed(tiny_llama, tmp_path / "w8", "compressed-tensors", recipe="rtn-w8")
    with pytest.raises(RecipeError, match="awq cannot hold 14 of 14 quantized weights"):
        make_conversion(open_checkpoint(str(eight)), "awq")
    wide = compressed(untied_llama, tmp_path / "f32", "compressed-tensors", "quantize.group_size=32")
    with pytest.raises(SourceError, match="are no float16 numbers"):
        make_conversion(open_checkpoint(str(wide)), "gptq")
    with pytest.raises(SourceError, match="is not compressed"):
        make_conversion(open_checkpoint(str(tiny_llama)), "gptq")
    mixed = compressed(tiny_llama, tmp_path / "mixed", "compressed-tensors")
    with pytest.raises(RecipeError, match="awq has one group_size"):
        make_conversion(open_checkpoint(str(mixed)), "awq")
    with pytest.raises(RecipeError, match="without loss"):
        make_conversion(open_checkpoint(str(eight)), "dense")


def test_int8_inputs_do_not_get_lost(tiny_llama, tmp_path):
    source = compressed(tiny_llama, tmp_path / "w8a8", "compressed-tensors", recipe="w8a8-dynamic")
    with pytest.raises(RecipeError, match="16-bit inputs"):
        make_conversion(open_checkpoint(str(source)), "gptq")


def test_files_that_describe_the_former_format_stay_behind(tiny_llama, tmp_path):
    source = compressed(tiny_llama, tmp_path / "a", "gptq", "quantize.group_size=32")
    (source / "quantize_config.json").write_text("{}")
    (source / "outlierq.json").unlink()  # it does not know that file
    convert(make_conversion(open_checkpoint(str(source)), "compressed-tensors"), tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert "quantize_config.json" not in names and {"tokenizer.json", "LICENSE", "outlierq.json"} <= names


def test_the_command_converts_when_the_format_is_all_that_is_said(tiny_llama, tmp_path, outlierq):
    source = compressed(tiny_llama, tmp_path / "a", "gptq", "quantize.group_size=32")
    said = outlierq("quantize", source, "--format", "awq", "-o", tmp_path / "b", "-q")
    assert said.code == 0 and "converted without loss" in said.out, said.err
    check_equal(source, tmp_path / "b")
    planned = outlierq("plan", source, "--format", "compressed-tensors", "--json")
    assert planned.code == 0 and json.loads(planned.out)["recipe"] == "conversion to compressed-tensors"
    anew = outlierq("plan", source, "--format", "awq", "-r", "rtn-w4", "--set", "quantize.group_size=32", "--json")
    assert anew.code == 0 and "the source is compressed with gptq" in json.loads(anew.out)["notes"][0]
    unknown = outlierq("quantize", source, "--format", "zip", "-o", tmp_path / "c")
    assert unknown.code == 2 and "compressed-tensors" in unknown.err


def test_the_format_option_replaces_the_one_of_the_recipe(tiny_llama, tmp_path, outlierq):
    words = ("-r", "rtn-w4", "--set", "quantize.group_size=32", "--format", "awq")
    assert outlierq("quantize", tiny_llama, *words, "-o", tmp_path / "out", "-q").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert "awq" in outlierq("plan", tiny_llama, *words, "--json").out
