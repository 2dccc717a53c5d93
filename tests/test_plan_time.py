"""What a plan says of time: on a busy machine, in days, and that it is unknown."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from outlierq import api
from outlierq.pipeline.planning import estimate as estimates
from outlierq.pipeline.planning import speed
from outlierq.pipeline.planning.plan import Estimate
from outlierq.report import terminal


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(monkeypatch, rates: list[float], load: float = 0.0):
    left = iter(rates)
    monkeypatch.setattr(speed, "_sample", lambda matrix: next(left))
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (load, 0.0, 0.0))
    return speed.measured_speed()


def test_the_best_rate_is_kept_for_a_machine_and_slower_samples_say_how_busy_it_is(cache, monkeypatch):
    idle = measured(monkeypatch, [80.0] * 7 + [100.0])
    assert idle.best == 100 and idle.waiting == pytest.approx(100 / 82.5)
    busy = measured(monkeypatch, [20.0] * 8)
    assert busy.best == 100 and busy.waiting == pytest.approx(5)


def test_a_load_that_samples_do_not_meet_counts_as_well(cache, monkeypatch):
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert measured(monkeypatch, [100.0] * 8, load=4.0).waiting == pytest.approx(2.5)
    assert measured(monkeypatch, [100.0] * 8).waiting == 1


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": "x"}', b"\xff"])
def test_a_damaged_or_forbidden_cache_is_no_obstacle(cache, monkeypatch, content):
    cache.mkdir()
    (cache / "speed.json").write_bytes(content)
    assert measured(monkeypatch, [50.0] * 8).best == 50
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    assert measured(monkeypatch, [50.0] * 8).best == 50


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


def test_a_run_says_what_it_will_cost_before_it_starts(outlierq, tiny_llama, tmp_path):
    answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out")
    assert answer.code == 0 and "bytes, exact)" in answer.err and "time: about " in answer.err
