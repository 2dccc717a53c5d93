"""A job tells how far it is: within a block, too, with the time that is gone and left, and never looks dead."""

from __future__ import annotations

import io
import re
import sys
import threading
import types

import pytest
from rich.console import Console

import outlierq
from outlierq.pipeline.asked.events import Event
from outlierq.report import progress, terminal
from outlierq.report.course import Course

LITTLE = {"calibration.samples": 20, "calibration.sequence_length": 16, "quantize.group_size": 32}


@pytest.fixture(scope="module")
def told(tiny_llama, tmp_path_factory) -> list[Event]:
    """Every event of a run that calibrates, transforms and rounds."""
    events: list[Event] = []
    out = tmp_path_factory.mktemp("told") / "out"
    outlierq.quantize(tiny_llama, "awq-gptq-w4", out=out, settings=LITTLE, device="cpu", progress=events.append)
    return events


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_step_of_a_block_is_told(told):
    steps = [event.step for event in told if event.stage == "quantize" and event.done == 1]
    assert steps[:2] == ["", "transform"] and steps[-1] == "writing"
    assert "rounding q_proj, k_proj, v_proj" in steps and "rounding down_proj" in steps


def test_what_surrounds_the_blocks_is_told(told):
    steps = [(event.done, event.step) for event in told if event.stage == "quantize"]
    assert steps[0] == (0, "what is outside of the blocks") and steps[-1] == (2, "verifying")


def test_the_calibration_moves_on_with_every_batch(told):
    calibrated = [event.done + event.share for event in told if event.stage == "calibrate"]
    assert len(set(calibrated)) > 6 and calibrated[0] == 0 and calibrated[-1] == 2
    reading = [event.share for event in told if event.step == "statistics of its inputs" and event.done == 0]
    assert reading == sorted(reading) and reading[0] == 0 and reading[-1] == 1


def test_a_run_has_one_bar_that_only_moves_on(told):
    course, standings = Course(), []
    for event in told:
        course.listen(event)
        standings.append(course.standing())
    run = [standing for standing in standings if standing.stage == "quantize"]
    places = [standing.place for standing in run]
    assert {standing.stage for standing in standings} == {"quantize"}, "calibration is a part of each block"
    assert places == sorted(places) and len(set(places)) > 12 and places[-1] == 2


def test_time_left_follows_from_finished_blocks_and_runs_down_while_nothing_is_told():
    clock = Clock()
    course = Course(clock)
    course.listen(Event("calibrate", 0, 30))
    assert course.standing().left is None, "nothing is known before a block is done"
    for block in range(1, 11):
        clock.now = 60.0 * block
        course.listen(Event("calibrate", block, 30))
    assert course.standing().left == pytest.approx(20 * 60)
    clock.now += 45
    assert course.standing().left == pytest.approx(20 * 60 - 45) and course.standing().gone == 645
    course.listen(Event("calibrate", 30, 30))
    assert course.standing().left is None


@pytest.mark.parametrize("before", [0.1, 900.0], ids=["an earlier run has made", "had to read the text"])
def test_time_left_does_not_follow_blocks_that_were_special(before):
    clock = Clock()
    course = Course(clock)
    for block in range(20):
        clock.now += before if block < 17 else 100.0
        course.listen(Event("quantize", block + 1, 30))
    assert course.standing().left == pytest.approx(1000)


def test_a_log_has_the_time_the_step_and_the_error_and_a_line_for_every_stage():
    said: list[str] = []
    with progress.lines(said.append) as listen:
        listen(Event("calibrate", 0, 30, step="statistics of its inputs"))
        listen(Event("calibrate", 0, 30, step="statistics of its inputs", share=0.5))  # too soon for another line
        listen(Event("quantize", 3, 30, error=0.01, step="rounding down_proj"))
    assert [line.partition(" · peak")[0] for line in said] == [
        "calibrate 0/30 · 0 s · statistics of its inputs",
        "quantize 3/30 · 0 s · rounding down_proj · error 1.00%",
    ]


def test_a_verbose_log_has_a_line_for_every_step_and_only_one(told):
    said: list[str] = []
    with progress.lines(said.append, steps=True) as listen:
        for event in told:
            listen(event)
    steps = {(event.done, event.step) for event in told if event.step}
    assert len(said) == len(steps) and any("rounding down_proj" in line for line in said)


def test_a_log_goes_on_by_itself_during_a_long_step(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.02)
    monkeypatch.setattr(progress, "LONG_STEP", 0.0)
    said: list[str] = []
    enough = threading.Event()

    def write(line: str) -> None:
        said.append(line)
        if len(said) == 4:
            enough.set()

    with progress.lines(write) as listen:
        listen(Event("quantize", 3, 30, step="rounding experts"))
        assert enough.wait(10), "no line although time passed"
    count = len(said)
    assert all("rounding experts for 0 s" in line for line in said[1:4])
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"] and len(said) == count


def test_without_room_for_a_thread_only_events_are_told(monkeypatch):
    def refuse(count: int) -> None:
        raise MemoryError

    monkeypatch.setattr("outlierq.core.machine.threads.check_room", refuse)
    said: list[str] = []
    with progress.lines(said.append) as listen:
        listen(Event("verify", 1, 3))
    assert len(said) == 1


def drawn(monkeypatch, width: int, *events: Event, **options: bool) -> str:
    """What a terminal of this width shows at the end of these events."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, **options)
    monkeypatch.setattr(terminal, "make_console", lambda *, stderr: console)
    with progress.bar() as listen:
        for event in events:
            listen(event)
    return screen.getvalue().rpartition("\x1b[?25h")[0]


@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_the_bar_fits_the_terminal_and_keeps_its_figures(monkeypatch, width):
    step = "rounding gate_proj, up_proj, down_proj"
    text = drawn(monkeypatch, width, Event("quantize", 1, 4, error=0.0123, step=step, share=0.5))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    assert "quantize" in text and "1/4" in text
    assert ("━" in text) == (width >= 40) and (f"{step} 50%" in text) == (width >= 80)
    assert "error 1.23%" in text and max(len(line) for line in plain) < width


def test_no_color_means_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = drawn(monkeypatch, 80, Event("calibrate", 1, 4))
    assert "1/4" in text and "\x1b[3" not in text.replace("\x1b[3A", "")


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch, name):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", name)
    assert not progress.on_terminal()
    monkeypatch.setenv("TERM", "xterm")
    assert progress.on_terminal()


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed()], ids=["none", "closed"])
def test_a_job_runs_without_stderr_and_stdout_stays_clean(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.listening(True) as listen:
        listen(Event("verify", 0, 1))
    assert capsys.readouterr().out == ""


def test_a_notebook_shows_a_line_that_is_text_where_html_is_not_shown(monkeypatch):
    shown: list[dict[str, str]] = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data))
    display = types.ModuleType("IPython.display")
    display.display = lambda data, raw, display_id: shown.append(data) or handle
    shell = type("ZMQInteractiveShell", (), {})()
    notebook = types.ModuleType("IPython")
    notebook.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with progress.listening(True) as listen:
        listen(Event("quantize", 3, 30, step="<b>", error=0.01))
    assert shown[0]["text/plain"].startswith("preparing")
    assert shown[-1]["text/plain"].startswith("quantize 3/30 · 0 s · <b> · error 1.00%")
    assert '<progress value="3.50" max="30">' in shown[-1]["text/html"] and "<b>" not in shown[-1]["text/html"]


def test_a_log_file_has_every_step_the_plan_and_the_end(outlierq, tiny_llama, tmp_path):
    log, settings = tmp_path / "logs" / "run.log", [word for s in LITTLE.items() for word in ("-s", "{}={}".format(*s))]
    quantize = ("quantize", tiny_llama, "-r", "gptq-w4", *settings, "-q", "--log-file", log)
    answer = outlierq(*quantize, "-o", tmp_path / "out")
    assert answer.code == 0 and answer.err == ""
    assert outlierq(*quantize, "-o", tmp_path / "out").code == 1
    lines = log.read_text().splitlines()
    assert all(line[:4].isdigit() and line[10] == "T" for line in lines)
    texts = [line.partition(" ")[2] for line in lines]
    assert texts[0].startswith("outlierq quantize") and "done" in texts
    assert any("rounding down_proj" in text for text in texts)
    assert any(text.startswith("error:") and "exists" in text for text in texts)


def test_a_log_file_that_cannot_be_written_is_said_before_work(outlierq, tiny_llama, tmp_path):
    (tmp_path / "taken").write_text("")
    answer = outlierq("verify", tiny_llama, "--log-file", tmp_path / "taken" / "log")
    assert answer.code == 1 and "--log-file" in answer.err and "Traceback" not in answer.err


def test_verbose_has_a_line_for_every_step_on_stderr(outlierq, tiny_llama, tmp_path):
    answer = outlierq("calibrate", tiny_llama, "-o", tmp_path / "s", "--samples", 4, "--sequence-length", 16, "-v")
    assert answer.code == 0
    assert answer.err.count("statistics of its inputs") == 2 and "final logits" in answer.err


def test_rows_of_a_table_follow_one_another_where_columns_would_be_too_narrow():
    rows = [types.SimpleNamespace(count=5, sites="self_attn.q_proj", treatment="int4", source_bytes=8, output_bytes=2)]
    screens = {}
    for width in (40, 100):
        console = Console(file=io.StringIO(), width=width)
        console.print(terminal.plan(rows))
        screens[width] = console.file.getvalue()
    assert "5 × · self_attn.q_proj · int4 · 8 B ·" in screens[40] and "──" in screens[100]
