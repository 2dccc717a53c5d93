"""What a run wrote is known to the byte afterwards: by verify, publish, and whatever loads the result."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import outlierq
from outlierq.core.errors import SourceError
from outlierq.core.machine.record import signature, signature_of, signed
from outlierq.core.report import REPORT_NAME, Report
from outlierq.load import changed_files, load_model, open_checkpoint, report_beside
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory) -> Path:
    """A result in several shards. Read-only."""
    out = tmp_path_factory.mktemp("record") / "out"
    recipe = load("rtn-w4", ["quantize.group_size=32", "export.max_shard_size=60KB"])
    quantize(make_plan(open_checkpoint(str(tiny_llama)), recipe), out)
    return out


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def report_of(folder: Path) -> Report:
    report = report_beside(folder)
    assert report is not None
    return report


def test_every_file_but_the_report_is_recorded_and_every_unit(written):
    record = report_of(written).record
    names = {path.name for path in written.iterdir()}
    assert record["files"].keys() == names - {REPORT_NAME} and len(names) > 8
    assert record["units"].keys() == {"outside", "block-00000", "block-00001"}
    assert record["run"]["source"] == report_of(written).fingerprint
    assert list(changed_files(written, report_of(written))) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_one_other_byte_in_a_small_file_is_told(name, folder):
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    said = [(fault.check, fault.tensor) for fault in verify(str(folder)).faults]
    assert said == [("record", name)]
    with pytest.raises(SourceError, match=f"is not what its run wrote: {name}"):
        load_model(open_checkpoint(str(folder)))


def test_one_other_bit_in_any_shard_is_told(folder):
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
    assert [name for name, _ in changed_files(folder, report_of(folder))] == [path.name for path in shards]


def test_a_missing_file_and_a_file_that_programs_would_read_are_told(folder):
    (folder / "generation_config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "my_notes.log").write_text("mine")
    assert [name for name, _ in changed_files(folder, report_of(folder))] == [
        "generation_config.json",
        "adapter_config.json",
    ]


def test_what_is_there_for_people_may_change(folder):
    (folder / "README.md").write_text("# Mine\n")
    (folder / "LICENSE").unlink()
    assert verify(str(folder)).sound


def test_the_signature_covers_what_the_report_says_and_not_what_is_measured_later(written, folder):
    report = report_of(written)
    assert signature(report) == report.record["signed"]
    assert signature(replace(report, evaluation={"divergence": {}})) == report.record["signed"]
    changed = replace(report, settings={**report.settings, "name": "another"})
    assert signature(changed) != report.record["signed"]
    (folder / REPORT_NAME).write_text(json.dumps(changed.to_dict()))
    assert [fault.tensor for fault in verify(str(folder)).faults] == [REPORT_NAME]
    (folder / REPORT_NAME).write_text(json.dumps(signed(changed).to_dict()))
    assert verify(str(folder)).sound


def test_a_report_of_a_version_that_knew_fewer_fields_is_as_it_was_signed(folder):
    content = json.loads((folder / REPORT_NAME).read_text())
    del content["quantized_share"]
    content["record"]["signed"] = signature_of(content)
    (folder / REPORT_NAME).write_text(json.dumps(content))
    assert list(changed_files(folder, report_of(folder))) == []
    content["notes"] = ["another"]
    (folder / REPORT_NAME).write_text(json.dumps(content))
    assert [name for name, _ in changed_files(folder, report_of(folder))] == [REPORT_NAME]


def test_a_report_of_a_version_without_records_is_read_and_said(folder):
    values = json.loads((folder / REPORT_NAME).read_text())
    del values["record"]
    (folder / REPORT_NAME).write_text(json.dumps(values))
    found = verify(str(folder))
    assert found.sound and any("keeps no digests" in note for note in found.notes)
    load_model(open_checkpoint(str(folder)))


def test_a_resumed_run_records_the_units_of_the_first_one(tiny_llama, tmp_path, written):
    from outlierq.pipeline.block import data_free

    plan = make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w4", ["quantize.group_size=32"]))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    quantize(plan, whole)
    done = data_free.done_in_order

    def two(units, output, device):
        results = done(units, output, device)
        yield next(results)
        yield next(results)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data_free, "done_in_order", two)
        quantize(plan, stopped)
    quantize(plan, stopped)
    first, second = (report_of(place).record for place in (whole, stopped))
    assert first["files"] == second["files"] and first["units"] == second["units"]


def test_a_gguf_file_is_recorded_beside_it(tools, tmp_path):
    source = tools.write_llama(tmp_path / "source", hidden_size=256, intermediate_size=256)
    recipe = load("gguf-q4_k", ["calibration.samples=6", "calibration.sequence_length=32"])
    quantize(make_plan(open_checkpoint(str(source)), recipe), tmp_path / "out")
    assert verify(str(tmp_path / "out"), str(source)).sound  # the folder, or the file in it
    path = tmp_path / "out" / "model.gguf"
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 1
    path.write_bytes(raw)
    assert [fault.check for fault in verify(str(path)).faults] == ["record"]


class TestEveryReader:
    """A dense result is a source like any other, and whoever reads it holds it against its record."""

    @pytest.fixture(scope="class")
    def dense(self, tiny_llama, tmp_path_factory) -> Path:
        """The tiny model written anew. Read-only."""
        out = tmp_path_factory.mktemp("record") / "dense"
        quantize(make_plan(open_checkpoint(str(tiny_llama)), load("dense")), out)
        return out

    @pytest.fixture
    def damaged(self, dense, tmp_path) -> Path:
        """One bit of its last weight file is another."""
        folder = Path(shutil.copytree(dense, tmp_path / "damaged"))
        shard = sorted(folder.glob("*.safetensors"))[-1]
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        return folder

    @pytest.mark.parametrize(
        "job",
        [
            lambda model, out: outlierq.quantize(model, "rtn-w4", out=out, settings={"quantize.group_size": 32}),
            lambda model, out: outlierq.calibrate(model, out=out),
            lambda model, out: outlierq.detect(model),
            lambda model, out: outlierq.evaluate(model, tasks=[], limit=1),
        ],
        ids=["quantize", "calibrate", "detect", "evaluate"],
    )
    def test_what_reads_weights_refuses_one_other_bit_before_any_work(self, job, damaged, tmp_path):
        with pytest.raises(SourceError, match=r"is not what its run wrote: model\.safetensors was changed"):
            job(str(damaged), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_conversion_refuses_one_other_bit(self, folder, tmp_path):
        shard = sorted(folder.glob("*.safetensors"))[-1]
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        with pytest.raises(SourceError, match="is not what its run wrote"):
            outlierq.convert(str(folder), "gptq", out=tmp_path / "out")

    def test_what_reads_headers_alone_tells_other_sizes_and_small_files(self, dense, tmp_path):
        folder = Path(shutil.copytree(dense, tmp_path / "copy"))
        assert outlierq.inspect(str(folder))["changed_since_run"] == []
        outlierq.plan(str(folder), "rtn-w4")
        config = folder / "generation_config.json"
        config.write_bytes(config.read_bytes() + b" ")
        assert "generation_config.json was changed" in outlierq.inspect(str(folder))["changed_since_run"][0]
        with pytest.raises(SourceError, match=r"is not what its run wrote: generation_config\.json"):
            outlierq.plan(str(folder), "rtn-w4")
