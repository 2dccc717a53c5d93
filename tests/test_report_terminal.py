"""Terminal tables hold the figures, fit 80 columns, and are plain where they should be."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from outlierq.core.limits import GateRow
from outlierq.core.report import Report, SiteRow
from outlierq.evaluate.comparison import CheckpointSize, Comparison
from outlierq.evaluate.divergence import Divergence
from outlierq.pipeline.planning.plan import PlanRow
from outlierq.report import terminal

DIVERGENCE = Divergence(12282, 6, 2048, 19.834, 42.1, 18.912, 0.0413, 0.0021, 0.8912, 812, 301)


def site(index, error, name="mlp.down_proj", note=""):
    return SiteRow(f"model.layers.{index}.{name}", "gptq", 4, 64, True, error, 0.1, 4.25, 1.2, note)


def task(name, value, parent=None):
    return {"task": name, "metric": "acc", "value": value, "stderr": 0.0031, "samples": 14042, "parent": parent}


REPORT = Report(
    model="org/some-model-instruct",
    recipe="awq-gptq-w4",
    settings={"quantize": {"bits": 4}},
    out="small",
    fingerprint="ab",
    versions={},
    seeds={},
    machine={},
    rows=(site(0, 0.0123), site(1, 0.0984, note="damped twice"), site(0, 0.001, "self_attn.q_proj")),
    transforms=(),
    notes=("lm_head left in bfloat16",),
    source_bytes=269_060_552,
    output_bytes=91_060_552,
    bits_per_weight=5.41,
    quantized_bits_per_weight=4.25,
    source_bits_per_weight=16.0,
    seconds={"calibrate": 98.2, "quantize": 64.3},
    peak_bytes=1_890_000_000,
    evaluation={"divergence": DIVERGENCE.to_dict(), "tasks": {"rows": [task("mmlu", 0.2893)]}},
)


def shown(renderable, width=80):
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(renderable)
    text = file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_summary_holds_every_figure_at_any_width(width):
    text = shown(terminal.summary(REPORT), width)
    figures = ["269 MB", "91.1 MB", "2.95× smaller", "16.00", "5.41", "4.25", "18.912", "19.834", "+4.88 %"]
    figures += ["0.0413 nats", "± 0.0021", "89.12 %", "812 lost, 301 won", "2 min 42 s", "1.89 GB", "0.2893"]
    for figure in figures:
        assert figure in text


def test_the_worst_site_comes_first_and_keeps_its_note():
    text = shown(terminal.sites(REPORT.rows, worst=2))
    assert text.index("down_proj") < text.index("q_proj")
    worst = text[text.index("worst sites") :]
    assert worst.index("layers.1.mlp") < worst.index("layers.0.mlp")
    assert "9.84 %" in worst
    assert "damped twice" in worst
    assert "q_proj" not in worst


def test_a_data_free_run_shows_the_weight_error():
    text = shown(terminal.sites([replace(row, output_error=None) for row in REPORT.rows]))
    assert "weight error" in text
    assert "output error" not in text
    assert "10.0 %" in text


def test_notes_are_printed():
    assert "lm_head left in bfloat16" in shown(terminal.summary(REPORT))


def test_square_brackets_in_names_and_notes_are_kept():
    rows = [replace(REPORT.rows[0], site="model.layers[red].up", note="[bold]"), REPORT.rows[1]]
    text = shown(terminal.summary(replace(REPORT, rows=tuple(rows), notes=("ignored: re:.*[a-z]_proj [/b]",))))
    assert "layers[red].up" in text
    assert "[bold]" in text
    assert "re:.*[a-z]_proj [/b]" in text


def test_a_tiny_divergence_is_not_shown_as_zero():
    text = shown(terminal.divergence(replace(DIVERGENCE, kl_per_token=0.00003, kl_standard_error=0.000002)))
    assert "0.000030 nats" in text
    assert "± 0.000002" in text


def test_unknown_figures_leave_no_trace_of_none():
    bare = replace(REPORT, evaluation=None, peak_bytes=None, quantized_bits_per_weight=None, rows=(), notes=())
    text = shown(terminal.summary(replace(bare, source_bits_per_weight=None)))
    assert "None" not in text
    assert "perplexity" not in text
    assert "None" not in shown(terminal.divergence(Divergence(10, 1, 11, 5.0, 0.2)))


def test_a_plan_adds_up():
    rows = [
        PlanRow("model.layers.*.mlp.*", 90, "gptq int4 g64", 160_000_000, 40_000_000),
        PlanRow("embed_tokens", 1, "copied", 40_000_000, 40_000_000),
    ]
    text = shown(terminal.plan(rows, ["group 128 does not divide 576"]))
    for figure in ("160 MB", "4.00×", "1.00×", "200 MB", "80.0 MB", "2.50×", "does not divide 576"):
        assert figure in text


def test_tasks_are_shown_beside_those_of_the_source():
    text = shown(terminal.tasks({"rows": [task("mmlu", 0.28)]}, {"rows": [task("mmlu", 0.30)]}))
    for figure in ("0.3000", "0.2800", "-0.0200", "± 0.0031"):
        assert figure in text
    assert "–" in shown(terminal.tasks({"rows": [task("mmlu", 0.28)]}, {"rows": []}))


def test_many_subtasks_are_counted_and_not_listed():
    rows = [task("mmlu", 0.3), task("mmlu_stem", 0.2, "mmlu")]
    rows += [task(f"mmlu_{index}", 0.1, "mmlu_stem") for index in range(19)]
    text = shown(terminal.tasks({"rows": rows}))
    assert "  mmlu_stem" in text
    assert "mmlu_7" not in text
    assert "19 rows" in text


def test_a_comparison_counts_tensors():
    before, after = (
        CheckpointSize(269_000_000, 134_500_000, 16.0, 0, None),
        CheckpointSize(91_000_000, 134_500_000, 5.41, 106_000_000, 4.25),
    )
    compared = Comparison(before, after, ("a",), (), ("b", "c"), 60)
    text = shown(terminal.comparison(compared, ("original", "small")))
    for figure in ("original", "134 M", "106 M", "2.96× smaller", "2 stored in another way", "60 as before", "1 added"):
        assert figure in text
    assert "2.96× larger" in shown(terminal.comparison(Comparison(after, before, (), (), (), 1)))


def test_a_failed_limit_stands_out():
    text = shown(terminal.gate([GateRow("KL", 0.2, "<=", 0.1), GateRow("top-1", 0.99, ">=", 0.9)]))
    assert text.index("FAILED") < text.index("passed")
    assert "≤ 0.1" in text
    assert "≥ 0.9" in text


def test_output_is_plain_when_it_is_not_a_terminal(monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    file = io.StringIO()
    console = terminal.make_console(file)
    console.print(terminal.summary(REPORT))
    assert "\x1b" not in file.getvalue()
    assert console.width == terminal.PIPE_WIDTH


def test_no_color_takes_the_colours_away(monkeypatch):
    limits = [GateRow("KL", 0.2, "<=", 0.1)]

    def written():
        file = io.StringIO()
        Console(file=file, force_terminal=True, color_system="standard").print(terminal.gate(limits))
        return file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "31m" in written()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in written()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (91_060_552, "91.1 MB"), (3e12, "3.00 TB")],
)
def test_bytes_read_well(count, text):
    assert terminal.human_bytes(int(count)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.417, "0.42 s"), (9.996, "10.0 s"), (59.97, "1 min 00 s"), (200, "3 min 20 s"), (3720, "1 h 02 min")],
)
def test_seconds_read_well(seconds, text):
    assert terminal.human_seconds(seconds) == text
