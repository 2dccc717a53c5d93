"""A sample of what `make coverage` tries: tiny models of many architectures, compressed, loaded again and compared."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest
from libraries import decoded_first, skip_unless_known

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from coverage_models import architectures  # noqa: E402

# By its path: a package that measures tests has the same name.
spec = importlib.util.spec_from_file_location("coverage_script", SCRIPTS / "coverage.py")
coverage = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = coverage  # dataclasses look their module up
spec.loader.exec_module(coverage)

SAMPLE = {
    "afmoe": "rtn-w8",
    "bamba": "rtn-w8",
    "bloom": "fp8-dynamic",
    "cohere2": "rtn-w8",
    "deepseek_v3": "fp8-dynamic",
    "falcon": "rtn-w8",
    "falcon_h1": "fp8-dynamic",
    "gemma3_text": "awq-gptq-w4",
    "gemma3n_text": "fp8-dynamic",
    "gemma4_text": "rtn-w8",
    "glm4_moe": "fp8-dynamic",
    "gpt2": "rtn-w8",
    "jamba": "fp8-dynamic",
    "kimi_linear": "fp8-dynamic",
    "lfm2": "rtn-w8",
    "llama": "awq-gptq-w4",
    "mamba2": "rtn-w8",
    "nanochat": "rtn-w8",
    "opt": "rtn-w8",
    "phi3": "fp8-dynamic",
    "qwen3": "rtn-w8",
    "qwen3_5_text": "fp8-dynamic",
    "qwen3_moe": "rtn-w8",
    "rwkv": "fp8-dynamic",
    "zamba2": "rtn-w8",
}


NEWER = ("falcon", "gpt2", "mamba2", "nanochat", "zamba2")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [pytest.param(*row, marks=decoded_first if row[0] in NEWER else ()) for row in SAMPLE.items()],
)
def test_a_tiny_model_of_the_architecture_comes_out_right(name, recipe):
    skip_unless_known(name, architectures())
    result = next(coverage.measure(name, architectures()[name], [recipe]))
    assert (result.state, result.sentence) == (coverage.RIGHT, "")
    assert result.share > coverage.ENOUGH and result.kl < coverage.LARGEST_KL[recipe] * result.shuffled + 1e-3


def test_every_architecture_of_both_kinds_is_tried():
    kinds = architectures()
    assert {"llama", "mamba", "gpt2"} <= {name for name, kind in kinds.items() if kind == "text"}
    assert {"qwen3_5", "gemma3"} <= {name for name, kind in kinds.items() if kind == "multimodal"}
    assert not {"bert", "bart", "whisper"} & kinds.keys()  # they fill in masks, translate, or hear


def test_a_model_that_cannot_be_built_is_a_result_and_not_the_end(monkeypatch):
    monkeypatch.setattr(coverage, "tiny_model", lambda name, kind: 1 / 0)
    results = list(coverage.measure("llama", "text", ["rtn-w8", "fp8-dynamic"]))
    assert [result.state for result in results] == [coverage.NOT_MADE] * 2
    assert "ZeroDivisionError" in results[0].sentence


def test_the_table_has_the_worst_of_the_recipes_and_names_no_folder(tmp_path, monkeypatch):
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(coverage, "ROOT", tmp_path)
    told = dict.fromkeys(("share", "error", "kl", "shuffled"), 1.0) | {"architecture": "llama", "kind": "text"}
    good = told | {"recipe": "rtn-w8", "state": coverage.RIGHT, "sentence": ""}
    here = tempfile.gettempdir()
    bad = told | {"recipe": "fp8-dynamic", "state": coverage.WRONG, "sentence": f"{here}/x | y"}
    coverage._write({("llama", "rtn-w8"): good, ("llama", "fp8-dynamic"): bad})
    page = (tmp_path / "docs/models.md").read_text()
    assert "| llama | text | WRONG |" in page and here not in page
    assert (
        "Of 1 text architectures that can be built 0 come out right (0.0%)." in page
        and "0 multimodal architectures that" not in page
    )
