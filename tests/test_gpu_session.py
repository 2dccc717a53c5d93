"""The script for the moment a GPU is lent: its steps, what it keeps when one is cut off, a model played on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import gpu_session

SCRIPT = Path(gpu_session.__file__)
DEVICE = {"name": "a made-up GPU"}


def test_the_steps_and_their_limits_are_printed_anywhere_and_fit_the_session():
    done = subprocess.run([sys.executable, SCRIPT, "--dry-run"], capture_output=True, text=True, check=True)
    names = [line.split("s  ")[1].split(":")[0] for line in done.stdout.splitlines()]
    assert names == ["test-gpu", "bench-gpu", "8B", "8B llm-compressor", "70B"]
    assert sum(step.limit for step in gpu_session.steps(Path())) <= gpu_session.SESSION_SECONDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--output", tmp_path / "r.json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (2, "nothing measured: there is no GPU that torch can use here")
    assert not (tmp_path / "r.json").exists()


def test_what_was_measured_before_a_step_fails_or_is_cut_off_is_kept(tmp_path):
    def fails(left: float) -> dict:
        raise RuntimeError("no kernel image")

    sleeping = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    chosen = [
        gpu_session.Step("good", "", 60, lambda left: gpu_session.limited([sys.executable, "-c", "print(5)"], left)),
        gpu_session.Step("bad", "", 60, fails),
        gpu_session.Step("slow", "", 2, lambda left: gpu_session.limited(sleeping, left)),
        gpu_session.Step("last", "", 60, lambda left: {"exit_code": 0}),
    ]
    started = time.monotonic()
    assert not gpu_session.session(chosen, tmp_path / "r.json", 60, DEVICE)
    assert time.monotonic() - started < 50
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["device"] == DEVICE
    steps = written["steps"]
    assert (steps["good"]["exit_code"], steps["good"]["last_lines"]) == (0, ["5"])
    assert steps["bad"]["error"] == "RuntimeError: no kernel image"
    assert (steps["slow"]["exit_code"], steps["slow"]["last_lines"]) == (None, ["begun"])
    assert steps["last"]["exit_code"] == 0


def test_a_session_without_time_leaves_steps_out(tmp_path):
    chosen = [gpu_session.Step("any", "", 60, lambda left: {"exit_code": 0})]
    assert not gpu_session.session(chosen, tmp_path / "r.json", 0.5, DEVICE)
    assert json.loads((tmp_path / "r.json").read_text())["steps"]["any"]["left_out"] == "no time is left"


def test_models_of_a_shape_are_compressed_with_more_and_more_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "SHAPES", {"tiny": (64, 128, 4, 2)})
    monkeypatch.setattr(gpu_session, "VOCABULARY", 256)
    monkeypatch.setattr(gpu_session, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_session, "WINDOW", 64)
    real, seconds = gpu_session.limited, iter((1.0, 1000.0))
    monkeypatch.setattr(gpu_session, "limited", lambda words, left: {**real(words, 300.0), "seconds": next(seconds)})
    found = gpu_session.growing(tmp_path, "tiny", 100.0)
    assert found["exit_code"] == 0, found["runs"][-1]["last_lines"]
    assert [run["blocks"] for run in found["runs"]] == [1, 2]
    assert found["runs"][0]["stages"]["quantize"] > 0 and found["runs"][0]["peak_bytes"] > 0


def test_a_peer_that_is_not_installed_is_left_out_with_a_reason(tmp_path):
    assert "not installed" in gpu_session.theirs(tmp_path, "8B", 2, 1.0)["left_out"]
