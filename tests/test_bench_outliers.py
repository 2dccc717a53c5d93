"""The outlier benchmark: every shipped recipe with quantized inputs has a row, and `--only` keeps the others."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from outlierq.recipe import load, shipped

FOLDER = Path(__file__).parents[1] / "benchmarks"
SECTION = {"stress_model": "6 channels x 60", "calibration": "some", "evaluation": "16 windows"}


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = spec_from_file_location("outliers", FOLDER / "outliers.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_shipped_recipe_with_int8_or_fp8_inputs_has_a_row(script):
    chosen = {name: load(name).quantize for name in shipped()}
    wanted = {name for name, quantize in chosen.items() if quantize and quantize.activations and quantize.bits == 8}
    assert len(wanted) >= 9
    assert wanted <= {recipe for recipe, _ in script.RUNS.values()}
    assert set(script.OTHER) <= script.RUNS.keys() and set(script.REMEDIES) <= script.RUNS.keys()


def test_only_what_is_asked_is_made_and_finished_rows_are_kept(script, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(script, "one_of_ours", lambda name, kind, *rest: made.append(f"{name}/{kind}") or {"kl": 0.5})
    old = tmp_path / "outlierq-auto-plain.16-windows.json"
    old.write_text('{"kl": 0.25}')
    models = {"plain": Path("plain"), "stressed": Path("stressed")}
    asked = SimpleNamespace(reuse=tmp_path, windows=16, only=("os-plus/plain", "auto/stressed"))
    found = script.ours(asked, models)
    assert made == ["os-plus/plain", "auto/stressed"]
    assert {name: row["kl"] for name, row in found.items()} == {
        "os-plus/plain": 0.5, "auto/plain": 0.25, "auto/stressed": 0.5
    }  # fmt: skip
    script.ours(SimpleNamespace(reuse=tmp_path, windows=16, only=("os-plus/plain",)), models)
    assert made[2:] == ["os-plus/plain"]  # again, though it was finished
    script.ours(SimpleNamespace(reuse=tmp_path, windows=16, only=()), models)
    assert len(made) == 3 + 2 * len(script.RUNS) - 3  # without --only: all that is not there yet


def test_rows_of_an_earlier_output_are_kept_only_where_the_texts_are_the_same(script, tmp_path):
    output = tmp_path / "outliers.json"
    assert script.measured_before(output, SECTION) == {}
    runs = {"bitsandbytes/plain": {"kl": 0.02}}
    output.write_text(json.dumps({"protocol": {**SECTION, "scheme": "in other words"}, "runs": runs}))
    assert script.measured_before(output, SECTION)["runs"] == runs
    assert script.measured_before(output, {**SECTION, "evaluation": "8 windows"}) == {}


def test_only_int8_throughout_competes_with_the_int8_peer(script):
    kl = {f"{name}/plain": 0.01 for name in script.OTHER} | {"smoothquant/plain": 0.012, script.PEER: 0.02}
    (found,) = [row for row in script.bounds(kl) if row["to"] == script.PEER]
    assert found["of"] == "smoothquant/plain" and found["met"]
