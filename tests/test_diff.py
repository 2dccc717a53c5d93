"""`outlierq diff` lists what two checkpoints do not share, by decoded values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.load import open_checkpoint
from outlierq.pipeline.diff import diff
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load

UP = "model.layers.1.mlp.up_proj.weight"


def changed_copy(source: Path, out: Path) -> Path:
    """One tensor dropped, one added, one doubled, one with a single other value, one of another shape."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    tensors["new.weight"] = torch.ones(3)
    tensors[UP] = tensors[UP] * 2
    tensors["model.norm.weight"][3] += 0.5
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 64)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_added_removed_and_changed_tensors_are_listed_with_their_errors(tiny_llama, tmp_path):
    other = open_checkpoint(str(changed_copy(tiny_llama, tmp_path / "b")))
    found = diff(open_checkpoint(str(tiny_llama)), other)
    assert found.added == ("new.weight",)
    assert found.removed == ("model.layers.0.input_layernorm.weight",)
    assert [change.name for change in found.changed] == ["model.layers.0.mlp.up_proj.weight", UP, "model.norm.weight"]
    shape, doubled, single = found.changed
    assert shape.relative_error is None and shape.shapes == ((96, 64), (8, 64))
    original = open_checkpoint(str(tiny_llama)).read(UP).float()
    assert doubled.relative_error == pytest.approx(1.0) and doubled.largest == original.abs().max()
    assert single.largest == pytest.approx(0.5, rel=1e-2) and single.relative_error < 0.2
    assert found.equal == len(other.tensors) - 4 and found.config == ()


def test_a_checkpoint_is_equal_to_itself_however_it_is_stored(tiny_llama, tmp_path):
    source = open_checkpoint(str(tiny_llama))
    assert diff(source, source).changed == () and diff(source, source).equal == len(source.tensors)
    folders = []
    for form in ("gptq", "gptq-v2", "awq"):
        recipe = load("rtn-w4", [f"export.format={form}", "quantize.group_size=32"])
        folders.append(tmp_path / form)
        quantize(make_plan(source, recipe), folders[-1])
    first, *others = (open_checkpoint(str(folder)) for folder in folders)
    for other in others:
        found = diff(first, other)
        assert (found.added, found.removed, found.changed) == ((), (), ())
        assert found.config == ("quantization_config",)
    found = diff(source, first)
    assert len(found.changed) == 14 and all(0.03 < change.relative_error < 0.12 for change in found.changed)


def test_the_command_prints_lines_or_json(tiny_llama, tmp_path, outlierq):
    other = changed_copy(tiny_llama, tmp_path / "b")
    shown = outlierq("diff", tiny_llama, other, "-q")
    assert shown.code == 0
    assert "+ new.weight" in shown.out and f"~ {UP}: relative error 100" in shown.out
    assert "1 added, 1 removed, 3 changed, 16 equal" in shown.out
    assert json.loads(outlierq("diff", tiny_llama, other, "--json", "-q").out)["removed"]
