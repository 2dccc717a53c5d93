"""The public functions: light to import, what their examples say is so, and values come out."""

from __future__ import annotations

import doctest
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import outlierq
from outlierq import api

FUNCTIONS = [name for name in outlierq.__all__ if isinstance(getattr(outlierq, name), FunctionType)]


@pytest.fixture(scope="module")
def compressed(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model at 4 bits. Read-only."""
    out = tmp_path_factory.mktemp("compressed") / "w4"
    outlierq.quantize(tiny_llama, "rtn-w4", out=out, settings={"quantize.group_size": 32}, device="cpu")
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_runs_and_gives_what_it_says(name, tiny_llama, compressed, tmp_path, monkeypatch):
    function = getattr(outlierq, name)
    names = {
        "outlierq": outlierq,
        "model": str(tiny_llama),
        "compressed": str(shutil.copytree(compressed, tmp_path / "c")),
    }
    example = doctest.DocTestParser().get_doctest(function.__doc__, names, name, api.__file__, 0)
    assert example.examples, f"outlierq.{name} has no example"
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)


def test_every_function_of_the_api_is_offered_and_every_public_name_is_there():
    public = {
        name
        for name, value in vars(api).items()
        if isinstance(value, FunctionType) and value.__module__ == api.__name__
    }
    assert {name for name in public if not name.startswith("_")} == set(FUNCTIONS)
    assert all(getattr(outlierq, name) is not None for name in outlierq.__all__)
    assert set(outlierq.__all__) <= set(dir(outlierq))


def test_a_name_that_is_not_there_is_said():
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        outlierq.quantise  # noqa: B018


@pytest.mark.parametrize("name", ["quantize", "evaluate"])
def test_a_function_stays_a_function_when_the_stage_of_its_name_is_imported(name):
    code = f"import outlierq.{name}, sys; print(outlierq.{name}.__module__, sys.modules['outlierq.{name}'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"outlierq.api outlierq.{name}\n"


def test_settings_are_a_dict_and_a_recipe_is_a_name_a_path_a_dict_or_a_recipe(tiny_llama, tmp_path):
    from outlierq.recipe import load

    keys = {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}
    (tmp_path / "mine.yaml").write_text("quantize:\n  method: rtn\n  group_size: 32\n")
    recipes = ["rtn-w4", tmp_path / "mine.yaml", keys]
    plans = [outlierq.plan(tiny_llama, recipe, settings={"quantize.group_size": 32}) for recipe in recipes]
    plans.append(outlierq.plan(tiny_llama, load("rtn-w4", ["quantize.group_size=32"])))
    assert {str(scheme) for plan in plans for scheme in plan.schemes.values()} == {"int4 symmetric g32"}
    with pytest.raises(outlierq.OutlierqError, match="read already"):
        outlierq.plan(tiny_llama, load("rtn-w4"), settings={"quantize.bits": 3})


def test_a_small_float_in_settings_stays_a_number(tiny_llama):
    plan = outlierq.plan(tiny_llama, "gptq-w4", settings={"quantize.damp": 1e-05})
    assert plan.recipe.quantize.options["damp"] == 1e-05


def test_an_opened_checkpoint_serves_as_well_as_its_name(tiny_llama):
    from outlierq.load import open_checkpoint

    assert outlierq.plan(open_checkpoint(str(tiny_llama))).rows == outlierq.plan(tiny_llama).rows


def test_the_plan_is_given_before_work_and_may_stop_it(tiny_llama, tmp_path):
    def too_large(plan: outlierq.Plan) -> None:
        raise KeyError(plan.output_bytes)

    with pytest.raises(KeyError):
        outlierq.quantize(tiny_llama, "rtn-w4", out=tmp_path / "out", planned=too_large)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_is_passed_is_in_the_report_and_raises_when_asked(tiny_llama, tmp_path):
    limits = outlierq.Limits(max_kl=0.0)
    options = {"gate.windows": 1, "gate.window_length": 32}
    report = outlierq.quantize(
        tiny_llama, "rtn-w4", out=tmp_path / "out", limits=limits, settings=options, device="cpu"
    )
    assert report.evaluation.passed is False and report.evaluation.kl > 0
    with pytest.raises(outlierq.GateError):
        report.evaluation.raise_if_failed()


def test_nothing_is_printed_unless_progress_is_asked_for(tiny_llama, tmp_path, capsys):
    outlierq.quantize(tiny_llama, "rtn-w4", out=tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    outlierq.quantize(tiny_llama, "rtn-w4", out=tmp_path / "told", progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "quantize 0/2 · 0 s · peak" in said.err


def test_a_listener_is_told_of_every_event(tiny_llama, tmp_path):
    events = []
    outlierq.quantize(tiny_llama, "rtn-w4", out=tmp_path / "out", progress=events.append)
    assert [(event.done, event.total) for event in events if event.stage == "quantize"] == [(0, 2), (1, 2), (2, 2)]


class TestNotebook:
    """Values show themselves, escaped; the notebook of the examples runs."""

    def test_every_value_that_shows_itself_is_a_table_of_escaped_text(self, tiny_llama, compressed):
        values = [
            outlierq.plan(tiny_llama, "rtn-w4"),
            outlierq.Report.from_dict(outlierq.inspect(compressed)["report"]),
            outlierq.evaluate(compressed, tiny_llama, windows=1, window_length=32, limits=outlierq.Limits(max_kl=9.0)),
            outlierq.compare(tiny_llama, compressed),
            outlierq.diff(tiny_llama, compressed),
            outlierq.detect(tiny_llama),
        ]
        assert all("<table><tr><th" in value._repr_html_() for value in values)
        assert "sound" in outlierq.verify(compressed)._repr_html_()

    def test_markup_in_a_value_is_text(self):
        found = outlierq.Verification("<b>x</b>", None)
        found.fault("files", "<script>", "a & b")
        shown = found._repr_html_()
        assert "&lt;script&gt;" in shown and "a &amp; b" in shown and "<script>" not in shown and "<b>x" not in shown

    def test_the_notebook_of_the_examples_runs_and_holds_no_outputs(self, tmp_path, monkeypatch):
        notebook = json.loads((Path(__file__).parents[1] / "examples" / "quickstart.ipynb").read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert len(cells) >= 4 and all(cell["outputs"] == [] for cell in cells)
        monkeypatch.chdir(tmp_path)
        names: dict = {"__name__": "__main__"}
        for cell in cells:
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
        assert names["report"].size.ratio > 1 and names["evaluation"].kl > 0
