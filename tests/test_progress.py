"""A job tells how far it is: within a block, too, with the time that is gone."""

from __future__ import annotations

import io

import pytest

import outlierq
from outlierq.pipeline.asked.events import Event
from outlierq.report import progress, terminal

LITTLE = {"calibration.samples": 20, "calibration.sequence_length": 16, "quantize.group_size": 32}


@pytest.fixture(scope="module")
def told(tiny_llama, tmp_path_factory) -> list[Event]:
    """Every event of a run that calibrates, transforms and rounds."""
    events: list[Event] = []
    out = tmp_path_factory.mktemp("told") / "out"
    outlierq.quantize(tiny_llama, "awq-gptq-w4", out=out, settings=LITTLE, device="cpu", progress=events.append)
    return events


def test_each_step_of_a_block_is_told(told):
    steps = [event.step for event in told if event.stage == "quantize" and event.done == 1]
    assert steps[:2] == ["", "transform"] and steps[-1] == "writing"
    assert "rounding q_proj, k_proj, v_proj" in steps and "rounding down_proj" in steps


def test_the_calibration_moves_on_with_every_batch(told):
    calibrated = [event.done + event.share for event in told if event.stage == "calibrate"]
    assert len(set(calibrated)) > 6 and calibrated[0] == 0 and calibrated[-1] == 2
    reading = [event.share for event in told if event.step == "statistics of its inputs" and event.done == 0]
    assert reading == sorted(reading) and reading[0] == 0 and reading[-1] == 1


def test_a_log_has_the_time_and_the_step(monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    listen = progress.lines(said.append)
    listen(Event("calibrate", 0, 30, step="statistics of its inputs"))
    listen(Event("calibrate", 0, 30, step="statistics of its inputs", share=0.2))  # too soon for another line
    listen(Event("calibrate", 0, 30, step="statistics of its inputs", share=0.5))
    listen(Event("quantize", 3, 30, error=0.01, step="rounding down_proj"))
    assert [line.partition(", peak")[0] for line in said] == [
        "calibrate 0/30, 0 s, statistics of its inputs",
        "calibrate 0/30, 11 s, statistics of its inputs 50%",
        "quantize 3/30, 0 s, rounding down_proj, error 1.00%",
    ]


def test_the_bar_of_a_stage_moves_within_a_block(monkeypatch):
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(terminal, "make_console", lambda stderr: console)
    with progress.bar() as listen:
        for share in (0.0, 0.5):
            listen(Event("calibrate", 1, 4, step="outputs", share=share))
    text = screen.getvalue()
    assert "outputs 50%" in text and "1/4" in text and "0:00:00" in text
