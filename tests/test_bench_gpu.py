"""The GPU benchmark, played on the CPU by the kernels' twins with tiny sizes: no bound is left out in silence."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from outlierq.kernels import launch

FOLDER = Path(__file__).parents[1] / "benchmarks"
WANTED = {
    "one token: 1.35 x copy + 3 us", "one token, 4096 x 4096: 7 us", "16 tokens: 1.25 x one token",
    "16 tokens: 2.2 x bf16", "64 tokens: 1.5 x bf16", "many tokens: 1.25 x the time of bf16",
    "quant_rows: 1.3 x copy + 3 us", "outliers: 10 % on top", "int8: not slower than _int_mm and one pass",
    "int8 with outliers: 3.0 x bitsandbytes", "int8 with outliers: 1.5 x bitsandbytes",
}  # fmt: skip


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """benchmarks/gpu_kernels.py on the CPU: calls run once, their times are made up."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = spec_from_file_location("gpu_kernels", FOLDER / "gpu_kernels.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def once(calls) -> list[float]:
        for call in calls:
            call()
        return [2.0, 1.0]

    small = {"8B o": (64, 256), "8B up": (128, 256)}
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "LAYERS", small)
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setattr(module, "COPIED_BYTES", 1 << 10)
    monkeypatch.setattr(module, "SQUARE", 64)
    monkeypatch.setattr(module, "copies", lambda size: 2)
    monkeypatch.setattr(module, "graph_us", once)
    monkeypatch.setattr(module, "eager_us", lambda call: once([call])[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "a device that does not exist")
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    return module


class Peer(torch.nn.Linear):
    """Stands for bitsandbytes' layer, with the arguments that it takes."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, has_fp16_weights: bool, threshold: float):
        super().__init__(inputs, outputs, bias=bias, dtype=torch.float16)

    def cuda(self) -> Peer:
        return self


def run(module: ModuleType, monkeypatch, output: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", "--output", str(output)])
    return module.main()


def test_one_command_measures_every_bound_and_names_the_device(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "peer_missing", lambda: "")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(nn=SimpleNamespace(Linear8bitLt=Peer)))
    code = run(script, monkeypatch, tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["bound"] for row in found["bounds"]} == WANTED
    assert found["device"]["name"] == "a device that does not exist"
    assert {row["tokens"] for row in found["w8a8"]} >= {1, 32, 2048}
    assert {row["tokens"] for row in found["w4a16"]} >= {1, 16, 64, 256, 2048}
    assert code == (0 if all(row["held"] for row in found["bounds"]) else 1)


def test_a_bound_that_could_not_be_measured_is_a_miss_and_not_silence(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "peer_missing", lambda: "bitsandbytes is not installed")
    assert run(script, monkeypatch, tmp_path / "gpu.json") == 1
    assert "MISS bitsandbytes is not installed" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["bitsandbytes"] == "bitsandbytes is not installed"


def test_bounds_hold_or_not_by_the_figures(script):
    packed = [
        {
            "layer": "8B o",
            "tokens": tokens,
            "us": [us],
            "copy_us": 3.0,
            "bf16_us": [10.0],
            "packed_bytes": 1,
            "speedup": 10 / us,
        }
        for tokens, us in ((1, 6.9), (16, 8.7), (64, 6.0), (256, 13.0))
    ]
    found = {row["bound"]: row["held"] for row in script.bounds(packed, [], [])}
    assert found == {
        "one token: 1.35 x copy + 3 us": True,  # 7.05
        "one token, 4096 x 4096: 7 us": True,
        "16 tokens: 1.25 x one token": False,  # 8.63
        "16 tokens: 2.2 x bf16": False,
        "64 tokens: 1.5 x bf16": True,
        "many tokens: 1.25 x the time of bf16": False,
    }


def test_without_a_gpu_nothing_is_written_and_one_line_says_why(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "unavailable", lambda: "no CUDA device")
    assert run(script, monkeypatch, tmp_path / "gpu.json") == 1
    assert capsys.readouterr().err == "nothing measured: no CUDA device\n"
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(("installed", "usable"), [("0.50.2", True), ("0.49.1", False), ("1.0.0", True)])
def test_an_older_bitsandbytes_is_not_the_one_the_bounds_are_about(script, monkeypatch, installed, usable):
    monkeypatch.setattr(script, "version", lambda name: installed)
    assert (script.peer_missing() == "") == usable


def test_weights_rotate_through_twice_the_cache(monkeypatch):
    spec = spec_from_file_location("gpu_kernels", FOLDER / "gpu_kernels.py")
    monkeypatch.syspath_prepend(str(FOLDER))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    for size in (8 << 20, 30 << 20, 200 << 20):
        assert module.copies(size) * size > 100 << 20
