"""A format says what it holds and registers itself: a new one is a writer, a reader and a row of facts."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import outlierq.export
import outlierq.load.packed
from outlierq import registry
from outlierq.core.errors import MethodError, OutputError, RecipeError
from outlierq.core.model import LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.export import Format, format_type
from outlierq.export.clients import table
from outlierq.load import decode, open_checkpoint, unpacked
from outlierq.load.packed import reading
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.quantize.rtn import rtn
from outlierq.recipe import load, parse
from outlierq.registry import storing

TWO_FILES = Path(__file__).parent / "toy_format"
PER_CHANNEL = ["export.format=toy", "quantize.group_size=channel"]
SHIPPED = (
    "awq", "bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq", "gptq-v2", "mxfp4", "outlierq-olive",
    "outlierq-split",
)  # fmt: skip


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """The folders of writers and readers, each with a further one in which a test may put files."""
    registry.formats()
    decode._import_readers()
    tables = (storing.FORMATS, reading.ROWS, reading.PRESENTATIONS, reading.HEADERS, table()["formats"])
    before = [dict(each) for each in tables]
    added = []
    for package in (outlierq.export, outlierq.load.packed):
        added.append(tmp_path / package.__name__)
        added[-1].mkdir()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(added[-1])])
    scans = (storing._import_own, decode._import_readers)
    for scan in scans:
        scan.cache_clear()
    yield added
    for each, content in zip(tables, before, strict=True):
        each.clear()
        each.update(content)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    for scan in scans:
        scan.cache_clear()


@pytest.fixture
def toy(folders):
    """A new format: two files and a row of facts."""
    writers, readers = folders
    shutil.copy(TWO_FILES / "toy_writer.py", writers)
    shutil.copy(TWO_FILES / "toy_reader.py", readers)
    table()["formats"]["toy"] = {"a client 1.0": [{"when": {"bits": 8}, "what": "loads"}]}


def test_a_format_of_two_files_compresses_verifies_and_is_read_back(toy, tiny_llama, tmp_path):
    source = open_checkpoint(str(tiny_llama))
    plan = make_plan(source, load("rtn-w8", PER_CHANNEL))
    assert plan.clients == ["a client 1.0: loads"]
    report = quantize(plan, tmp_path / "out")
    assert len(report.rows) == 14
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == {"quant_method": "toy"}
    name = "model.layers.0.mlp.up_proj.weight"
    written, original = unpacked(open_checkpoint(str(tmp_path / "out"))), source.read(name).float()
    assert name in written.packed
    scale = original.abs().amax(1, keepdim=True) / 127
    assert ((written.read(name) - original).abs() <= 0.51 * scale).all()
    assert torch.equal(written.read("model.norm.weight"), source.read("model.norm.weight"))


def test_a_writer_of_a_new_format_that_writes_something_else_is_caught(toy, tiny_llama, tmp_path, monkeypatch):
    writer = format_type("toy")
    encode = writer.encode
    wrong = lambda self, site, quantized: {  # noqa: E731
        name: -part if name.endswith("upside_down") else part for name, part in encode(self, site, quantized).items()
    }
    monkeypatch.setattr(writer, "encode", wrong)
    with pytest.raises(OutputError, match="decodes to something else than what was written, in its codes"):
        quantize(make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w8", PER_CHANNEL)), tmp_path / "out")


def test_what_a_new_format_cannot_hold_in_a_recipe_is_said_with_the_key(toy):
    with pytest.raises(RecipeError, match=r"quantize\.bits: toy stores 8 \(this is 4\)"):
        load("rtn-w4", PER_CHANNEL)
    with pytest.raises(RecipeError, match=r"quantize\.overrides\.0\.bits: toy stores 8 \(this is 4\)"):
        load("rtn-w8", [*PER_CHANNEL, "quantize.overrides=[{match: '*mlp*', bits: 4}]"])
    with pytest.raises(RecipeError, match="toy cannot keep outlier columns in 16 bits"):
        load("int8-split", ["export.format=toy"])


def test_a_new_format_without_a_row_of_facts_says_that_no_client_was_tried(toy):
    del table()["formats"]["toy"]
    assert format_type("toy").clients([QuantScheme(8, None)]) == ["no client was tried with toy"]


def test_a_new_format_without_a_reader_is_refused_before_anything_is_put_in_place(folders, tiny_llama, tmp_path):
    shutil.copy(TWO_FILES / "toy_writer.py", folders[0])
    with pytest.raises(Exception, match="no decoder of toy is known for a linear stored as scale, upside_down"):
        quantize(make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w8", PER_CHANNEL)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_file_in_the_folder_of_formats_is_an_error_as_often_as_one_asks(folders):
    (folders[0] / "broken_writer.py").write_text("import no_such_module_at_all")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            registry.formats()


def test_two_formats_of_one_name_are_refused_and_both_places_are_named(folders):
    with pytest.raises(MethodError, match="two formats are called 'awq': one of outlierq, one of the module "):
        type("Other", (Format,), {"__module__": "elsewhere"}, name="awq")


def test_a_format_of_an_installed_package_is_known_to_the_command_line(tiny_llama, tmp_path):
    shutil.copytree(TWO_FILES, tmp_path / "packages")
    about = tmp_path / "packages/toy_format-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-format\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("[outlierq.formats]\nwriter = toy_writer\nreader = toy_reader\n")
    paths = [str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]
    settings = [word for setting in PER_CHANNEL for word in ("-s", setting)]
    command = [sys.executable, "-m", "outlierq", "quantize", str(tiny_llama), "-r", "rtn-w8", *settings, "--quiet"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/outlierq.json").read_text())
    assert report["settings"]["export"]["format"] == "toy" and len(report["rows"]) == 14
    assert report["versions"]["format toy"].startswith("the package toy-format 0.1.0: toy_writer, sha256 ")


def test_the_shipped_formats_are_found_in_alphabetical_order():
    assert tuple(registry.formats()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_no_format_is_made_without_the_config_of_a_model(name):
    with pytest.raises(TypeError, match="config"):
        format_type(name)()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_format_answers_what_the_base_asks_with_the_base_s_arguments(name):
    asked = [n for n, member in vars(Format).items() if inspect.isfunction(getattr(Format, n, None)) and n[0] != "_"]
    for question in asked:
        signatures = [inspect.signature(getattr(each, question)).parameters for each in (Format, format_type(name))]
        assert list(signatures[0]) == list(signatures[1]), question


def test_gguf_has_the_queries_of_a_llama_in_the_rotary_order_because_it_knows_the_model():
    site = LinearSite("q_proj", "model.layers.0.self_attn.q_proj.weight", None, 64, 32, 0)
    scheme = QuantScheme(8, 32, scale_dtype="float16")
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    quantized = rtn(weight, None, scheme)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    llama, qwen = (format_type("gguf")({"model_type": kind, **heads}) for kind in ("llama", "qwen2"))
    (rotated,), (plain,) = (each.encode(site, quantized).values() for each in (llama, qwen))
    assert not torch.equal(rotated, plain) and torch.equal(rotated.sort(0).values, plain.sort(0).values)
    assert llama.row_order(site)["heads"] == 4 and qwen.row_order(site)["heads"] == 0


def test_a_format_that_is_not_known_gets_its_line_and_the_nearest_name():
    with pytest.raises(RecipeError, match=r"line 3, export.format: there is no format 'gptqq'; .*did you mean 'gptq'"):
        parse("quantize:\n  method: rtn\nexport: {format: gptqq}\n")
