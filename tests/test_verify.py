"""`outlierq verify` finds every planted fault, in each format, and none in a sound checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.core.errors import SourceError
from outlierq.load import open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import Verification, verify
from outlierq.recipe import load

PACKED = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq-v2": ("qweight", "qzeros", "scales", "g_idx"),
}
SCALES = {"compressed-tensors": "weight_scale"}
ZEROS = {"compressed-tensors": "weight_zero_point"}
SITE = "model.layers.1.mlp.up_proj"
# Folders that other programs wrote, and the model they were made from, for the slow test.
PEERS, PEERS_SOURCE = os.environ.get("OUTLIERQ_PEER_CHECKPOINTS", ""), os.environ.get("OUTLIERQ_PEER_SOURCE", "")


@pytest.fixture(scope="module")
def sound(tiny_llama, tmp_path_factory) -> Callable[[str], Path]:
    """A folder with zero points in the format, made once. Read-only."""
    made: dict[str, Path] = {}

    def folder(form: str) -> Path:
        if form not in made:
            settings = [f"export.format={form}", "quantize.group_size=32", "quantize.symmetric=false"]
            made[form] = tmp_path_factory.mktemp(form) / "out"
            quantize(make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w4", settings)), made[form])
        return made[form]

    return folder


@pytest.fixture
def damaged(sound, tmp_path) -> Callable[..., Path]:
    """A copy of a sound folder, after `change(tensors, config)`, as another program could have written it.

    Without the record of our run, which would find everything, each check has to find its own.
    """

    def make(form: str, change: Callable[[dict[str, torch.Tensor], dict], None]) -> Path:
        folder = Path(shutil.copytree(sound(form), tmp_path / "damaged"))
        tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "outlierq.json").unlink()
        return folder

    return make


def said(found: Verification) -> str:
    return "\n".join(f"{fault.check} | {fault.tensor} | {fault.what}" for fault in found.faults)


@pytest.mark.parametrize("form", PACKED)
def test_a_sound_checkpoint_has_no_fault_and_an_error_for_each_weight(form, sound, tiny_llama):
    found = verify(str(sound(form)), str(tiny_llama))
    assert found.sound, said(found)
    assert found.linears == len(found.errors) == 14
    assert all(0.03 < error < 0.12 for error in found.errors.values())
    assert json.loads(json.dumps(found.to_dict()))["sound"] is True


@pytest.mark.parametrize("recipe", ["rtn-w8", "w8a8-dynamic", "fp8-dynamic", "llm-int8", "int8-split", "dense"])
def test_other_formats_of_ours_are_sound(recipe, tiny_llama, tmp_path):
    chosen = load(recipe, ["calibration.samples=4", "calibration.sequence_length=16"] if recipe == "int8-split" else [])
    quantize(make_plan(open_checkpoint(str(tiny_llama)), chosen), tmp_path / "out")
    found = verify(str(tmp_path / "out"), str(tiny_llama))
    assert found.sound, said(found)
    assert found.linears == (0 if recipe == "dense" else 14)


@pytest.mark.parametrize("form", PACKED)
def test_a_scale_that_is_not_a_number_is_named(form, damaged):
    name = f"{SITE}.{SCALES.get(form, 'scales')}"

    def change(tensors, config):
        tensors[name][1, 1] = float("nan")

    found = verify(str(damaged(form, change)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("numbers", name)]


@pytest.mark.parametrize("form", PACKED)
def test_every_dropped_tensor_is_missed(form, damaged):
    import tempfile

    folder = damaged(form, lambda tensors, config: None)
    everything = load_file(folder / "model.safetensors")
    for name in [f"{SITE}.{role}" for role in PACKED[form]] + ["model.norm.weight", "model.embed_tokens.weight"]:
        with tempfile.TemporaryDirectory() as place:
            copy = Path(shutil.copytree(folder, Path(place) / "copy"))
            kept = {key: tensor for key, tensor in everything.items() if key != name}
            save_file(kept, copy / "model.safetensors", {"format": "pt"})
            found = verify(str(copy))
            assert not found.sound and name.rpartition(".")[0] in said(found), name


@pytest.mark.parametrize("form", PACKED)
def test_zero_points_of_other_groups_are_noticed_without_the_source(form, damaged):
    name = f"{SITE}.{ZEROS.get(form, 'qzeros')}"

    def change(tensors, config):
        tensors[name] = tensors[name].flip(0).flip(1).contiguous()

    found = verify(str(damaged(form, change)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("zero points", f"{SITE}.weight")]


def test_two_exchanged_zero_points_are_noticed_with_the_source(damaged, tiny_llama):
    def change(tensors, config):
        words = tensors[f"{SITE}.qzeros"]
        nibbles = [(int(words[0, 0]) >> (4 * k)) & 15 for k in range(8)]
        low, high = nibbles.index(min(nibbles)), nibbles.index(max(nibbles))
        assert nibbles[high] - nibbles[low] >= 2
        nibbles[low], nibbles[high] = nibbles[high], nibbles[low]
        word = sum(nibble << (4 * k) for k, nibble in enumerate(nibbles))
        words[0, 0] = word - (1 << 32) if word >= 1 << 31 else word

    folder = damaged("awq", change)
    found = verify(str(folder), str(tiny_llama))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("zero points", f"{SITE}.weight")]
    assert "2 of" in found.faults[0].what


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("form", PACKED)
def test_a_wrong_group_size_in_the_config_is_found(form, size, damaged):
    def change(tensors, config):
        described = config["quantization_config"]
        if form == "compressed-tensors":
            described = described["config_groups"]["group_0"]["weights"]
        described["group_size"] = size

    found = verify(str(damaged(form, change)))
    assert {fault.check for fault in found.faults} == {"layout"}
    # 64 does not even divide the columns, and some readers stop at the first such linear.
    assert len(found.faults) == 14 or (size == 64 and "do not divide" in found.faults[0].what)


@pytest.mark.parametrize("form", ["gptq", "gptq-v2", "compressed-tensors"])
def test_a_config_that_calls_zero_points_symmetric_is_found(form, damaged):
    def change(tensors, config):
        described = config["quantization_config"]
        if form == "compressed-tensors":
            described["config_groups"]["group_0"]["weights"]["symmetric"] = True
        else:
            described["sym"] = True

    found = verify(str(damaged(form, change)))
    assert {fault.check for fault in found.faults} == {"config"} and "symmetric" in said(found)


@pytest.mark.parametrize(("form", "said_version"), [("gptq", "gptq_v2"), ("gptq-v2", "gptq")])
def test_the_other_version_of_gptq_in_the_config_is_found(form, said_version, damaged):
    """Every zero point is then too small, or too large, by one."""

    def change(tensors, config):
        config["quantization_config"]["checkpoint_format"] = said_version

    found = verify(str(damaged(form, change)))
    assert {fault.check for fault in found.faults} == {"zero points"} and len(found.faults) == 14
    assert "by about one" in found.faults[0].what


@pytest.mark.parametrize("form", PACKED)
def test_a_head_beside_tied_embeddings_is_found(form, damaged):
    def change(tensors, config):
        assert config["tie_word_embeddings"] is True
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    found = verify(str(damaged(form, change)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("tied weights", "lm_head.weight")]


def test_a_tied_head_stored_twice_and_an_untied_head_that_is_missing_are_found(damaged, tmp_path):
    def twice(tensors, config):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    found = verify(str(damaged("awq", twice)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("tied weights", "lm_head.weight")]
    shutil.rmtree(tmp_path / "damaged")

    def untied(tensors, config):
        config["tie_word_embeddings"] = False

    found = verify(str(damaged("awq", untied)))
    assert not found.sound and "lm_head.weight" in said(found)


def test_tensors_without_a_place_and_linears_that_the_config_misjudges_are_found(damaged, tmp_path):
    def extra(tensors, config):
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(4)

    found = verify(str(damaged("gptq", extra)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("tensors", "model.layers.0.mlp.extra.weight")]
    shutil.rmtree(tmp_path / "damaged")

    def ignored(tensors, config):
        config["quantization_config"]["ignore"].append(SITE)

    found = verify(str(damaged("compressed-tensors", ignored)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("config", f"{SITE}.weight")]
    shutil.rmtree(tmp_path / "damaged")

    def plain(tensors, config):
        for role in PACKED["awq"]:
            del tensors[f"{SITE}.{role}"]
        tensors[f"{SITE}.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)

    found = verify(str(damaged("awq", plain)))
    assert [(fault.check, fault.tensor) for fault in found.faults] == [("config", f"{SITE}.weight")]


def test_the_weight_of_another_linear_is_found_with_the_source(damaged, tiny_llama):
    def change(tensors, config):
        for role in PACKED["gptq"]:
            one, other = f"{SITE}.{role}", f"model.layers.1.mlp.gate_proj.{role}"
            tensors[one], tensors[other] = tensors[other], tensors[one]

    folder = damaged("gptq", change)
    assert verify(str(folder)).sound
    found = verify(str(folder), str(tiny_llama))
    named = {(fault.check, fault.tensor) for fault in found.faults}
    assert named == {("source", f"{SITE}.weight"), ("source", "model.layers.1.mlp.gate_proj.weight")}


def test_a_shard_that_is_cut_off_is_found(damaged, outlierq):
    folder = damaged("gptq", lambda tensors, config: None)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    found = verify(str(folder))
    assert [fault.check for fault in found.faults] == ["files"] and "cut off" in said(found)


def test_scales_that_a_fold_moved_are_no_error(tiny_llama, tmp_path, small):
    settings = [text for text in small if text != "--set"]
    recipe = load("awq-w4", ["export.format=awq", "quantize.group_size=32", *settings])
    quantize(make_plan(open_checkpoint(str(tiny_llama)), recipe), tmp_path / "out")
    found = verify(str(tmp_path / "out"), str(tiny_llama))
    assert found.sound, said(found)
    assert all(error < 0.2 for error in found.errors.values())


def test_an_original_that_cannot_be_read_is_an_error_and_no_fault(sound, tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        verify(str(sound("awq")), str(tmp_path / "nowhere"))


def test_the_command_ends_with_0_or_1_and_prints_json(sound, damaged, tiny_llama, outlierq):
    good = outlierq("verify", sound("awq"), "--source", tiny_llama, "--json", "-q")
    assert good.code == 0 and json.loads(good.out)["faults"] == []
    assert "sound: no fault found" in outlierq("verify", sound("awq"), "-q").out

    def change(tensors, config):
        tensors[f"{SITE}.scales"][0, 0] = float("inf")

    folder = damaged("awq", change)
    bad = outlierq("verify", folder, "--json", "-q")
    assert bad.code == 1 and json.loads(bad.out)["faults"][0]["tensor"] == f"{SITE}.scales"
    plain = outlierq("verify", folder, "-q")
    assert plain.code == 1 and "1 fault(s) found" in plain.out and "Traceback" not in plain.err


@pytest.mark.slow
@pytest.mark.skipif(not PEERS, reason="set OUTLIERQ_PEER_CHECKPOINTS (folders, with :) and OUTLIERQ_PEER_SOURCE")
def test_checkpoints_of_other_programs_are_sound():
    folders = PEERS.split(":")
    assert folders
    for folder in folders:
        found = verify(folder, PEERS_SOURCE or None)
        assert found.sound, said(found)


def edited(folder: Path, **settings) -> Path:
    """The folder, with other settings in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


class TestAskedFirst:
    """What `verify` would say of a result, `quantize` says of the source before any work."""

    def test_a_head_of_its_own_that_the_config_calls_shared_is_refused(self, tools, outlierq, tmp_path):
        source = edited(tools.write_llama(tmp_path / "m", tie_word_embeddings=False), tie_word_embeddings=True)
        answer = outlierq("quantize", source, "-r", "rtn-w4", "-o", tmp_path / "out")
        assert answer.code == 1 and "config.json says that it shares" in answer.err and "lm_head.weight" in answer.err
        assert not list(tmp_path.glob("out*"))
        assert (
            outlierq("quantize", edited(source, tie_word_embeddings=False), "-r", "rtn-w4", "-o", tmp_path / "out").code
            == 0
        )
        assert outlierq("verify", tmp_path / "out").code == 0

    def test_more_blocks_than_the_config_says_are_refused(self, tools, outlierq, tmp_path):
        source = edited(tools.write_llama(tmp_path / "m", num_hidden_layers=3), num_hidden_layers=2)
        answer = outlierq("quantize", source, "-r", "rtn-w4", "-o", tmp_path / "out")
        assert answer.code == 1 and "model.layers.2." in answer.err and "number of layers" in answer.err
        assert not list(tmp_path.glob("out*"))

    def test_blocks_that_the_config_announces_behind_the_last_are_let_through(self, tools, outlierq, tmp_path):
        source = edited(
            tools.write_llama(tmp_path / "m", num_hidden_layers=3), num_hidden_layers=2, num_nextn_predict_layers=1
        )
        assert outlierq("quantize", source, "-r", "rtn-w4", "-o", tmp_path / "out").code == 0

    def test_a_shared_head_that_is_stored_a_second_time_is_written_once(self, tools, outlierq, tmp_path):
        source = tools.write_llama(tmp_path / "m")
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        assert outlierq("quantize", source, "-r", "rtn-w4", "-o", tmp_path / "out").code == 0
        assert outlierq("verify", tmp_path / "out").code == 0
