"""What a plan says of time: on a busy machine, in days, and that it is unknown."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf_models import write_model

from outlierq import api
from outlierq.pipeline.planning import estimate as estimates
from outlierq.pipeline.planning import speed
from outlierq.pipeline.planning.plan import Estimate
from outlierq.report import terminal


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(monkeypatch, alone: float, wall: float, load: float) -> speed.Speed:
    """A speed of samples that compute at one rate and, beside others, come at another by the clock."""
    monkeypatch.setattr(speed, "_sample", lambda matrix, threads: (alone, wall))
    monkeypatch.setattr(speed, "_load", lambda threads: load)
    return speed.measured_speed()


def test_the_best_rate_is_kept_for_a_machine(cache, monkeypatch):
    assert measured(monkeypatch, 100.0, 100.0, 1.0).best == 100
    assert measured(monkeypatch, 80.0, 20.0, 9.0).best == 100
    assert measured(monkeypatch, 120.0, 20.0, 9.0).best == 120


@pytest.mark.parametrize(("wall", "load", "waiting"), [(100, 0.3, 1), (25, 9, 6), (200, 4, 2), (25, 1, 2)])
def test_time_beside_others_is_between_what_samples_meet_and_what_the_load_says(
    cache, monkeypatch, wall, load, waiting
):
    assert measured(monkeypatch, 100.0, wall, load).waiting == pytest.approx(waiting)


def test_a_rate_does_not_suffer_from_threads_that_wait():
    import torch

    alone, wall = speed._sample(torch.ones(speed.SIDE, speed.SIDE, dtype=torch.bfloat16), 1)
    assert alone > 0.9 * wall > 0


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": "x"}', b"\xff"])
def test_a_damaged_or_forbidden_cache_is_no_obstacle(cache, monkeypatch, content):
    cache.mkdir()
    (cache / "speed.json").write_bytes(content)
    assert measured(monkeypatch, 50.0, 50.0, 1.0).best == 50
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert measured(monkeypatch, 50.0, 50.0, 1.0).best == 50


def test_a_busy_machine_days_and_the_unknown_are_said():
    assert terminal._time(Estimate(1, 100.0)) == "time: about 1 min 40 s, within a factor of two"
    busy = terminal._time(Estimate(1, 600.0, 3.0))
    assert busy.endswith(
        "about 10 min 00 s, within a factor of two; others keep this machine busy, alone it would be 3 min 20 s"
    )
    assert "about 22 days 10 h" in terminal._time(Estimate(1, 538 * 3600.0))
    assert terminal._time(Estimate(1, None)) == "time: unknown for this recipe on this machine"


def test_time_follows_what_a_recipe_does(cache, tiny_llama, monkeypatch):
    monkeypatch.setattr(estimates, "measured_speed", lambda: speed.Speed(1e6, 1e6, 1.0))
    plans = {name: api.plan(tiny_llama, name) for name in ("rtn-w4", "gptq-w4", "awq-gptq-w4", "gptaq-w4")}
    seconds = {name: plan.expected.seconds for name, plan in plans.items()}
    assert seconds["rtn-w4"] < seconds["gptq-w4"] < min(seconds["awq-gptq-w4"], seconds["gptaq-w4"])
    assert estimates.estimate(plans["gptq-w4"], stats=True).seconds < seconds["gptq-w4"]
    assert estimates.estimate(plans["gptq-w4"], device="cuda").seconds is None


def test_windows_that_the_model_has_no_positions_for_are_said_with_the_setting(tiny_llama):
    settings = {"gate.max_kl": 0.1, "calibration.sequence_length": 100_000, "gate.window_length": 100_000}
    said = "\n".join(api.plan(tiny_llama, "gptq-w4", settings=settings).notes)
    assert "windows of 100000 tokens exceed" in said
    assert "-s calibration.sequence_length=" in said and "-s gate.window_length=" in said
    assert "exceed" not in "\n".join(api.plan(tiny_llama, "rtn-w4").notes)


def test_time_without_data_counts_searching_and_decoding(cache, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "measured_speed", lambda: speed.Speed(1e9, 1e9, 1.0))
    for name in ("ROUNDED", "SEARCHED_INTEGERS", "SEARCHED_FLOATS", "FROM_GGUF"):  # as if the model were large
        monkeypatch.setattr(estimates, name, getattr(estimates, name) / 1e6)
    file = tmp_path / "model.gguf"
    api.quantize(write_model(tmp_path / "model", "llama", attention_bias=False), "gguf-q8_0", out=file)
    folder, decoded = (api.plan(source, "rtn-w4").expected.alone for source in (tmp_path / "model", file))
    assert decoded > 1.5 * folder
    searched = [api.plan(tiny_llama, name).expected.alone for name in ("rtn-w8", "rtn-w4", "mxfp4")]
    assert searched == sorted(searched) and searched[-1] > 2 * searched[0]


def test_a_calibration_before_the_plan_counts(cache, tiny_llama, monkeypatch):
    monkeypatch.setattr(estimates, "measured_speed", lambda: speed.Speed(1e6, 1e6, 1.0))
    settings = ({}, {"quantize.keep_share": None})
    both, alone = (api.plan(tiny_llama, "auto-nvfp4", settings=each).expected.alone for each in settings)
    assert both > 1.3 * alone


def test_learning_rotations_counts_by_its_steps(cache, tiny_llama, monkeypatch):
    monkeypatch.setattr(estimates, "measured_speed", lambda: speed.Speed(1e6, 1e6, 1.0))
    none, half, whole = (
        api.plan(tiny_llama, "spinquant-w4a4", settings={"transform.0.steps": steps}).expected.alone
        for steps in (0, 30, 60)
    )
    assert whole - half == pytest.approx(half - none) and whole > 1.3 * none


def test_a_run_says_what_it_will_cost_before_it_starts(outlierq, tiny_llama, tmp_path):
    answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out")
    assert answer.code == 0 and "bytes, exact)" in answer.err and "time: about " in answer.err
