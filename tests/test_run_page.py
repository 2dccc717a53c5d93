"""The page of a whole run says what its record says and what both models answer; nothing from outside runs in it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_outlier_page import SCRIPT, Page

from outlierq import api
from outlierq.core.errors import OutlierqError
from outlierq.core.report import Evaluation, Report, SiteRow
from outlierq.pipeline.measuring.run_report import RunReport
from outlierq.pipeline.measuring.samples import PROMPTS, Sample
from outlierq.pipeline.studying.caches import CacheRow, CacheStudy
from outlierq.report.pages.run_page import run_page

LITTLE = {"calibration.samples": 8, "calibration.sequence_length": 16, "quantize.group_size": 32}


def made_run(word: str = "SmolLM2-135M", blocks: int = 30) -> RunReport:
    """A run of a model of this size, with `word` for everything that a user or a model can name."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = tuple(
        SiteRow(f"model.layers.{b}.{kind}", word, 4, 128, True, 1e-3 * (1 + b + k), 0.1, 4.1, 0.1, word, "int4")
        for b in range(blocks)
        for k, kind in enumerate(kinds)
    )
    figures = {"perplexity": 12.5, "reference_perplexity": 12.0, "kl_per_token": 0.0412, "kl_standard_error": 0.001}
    evaluation = Evaluation(
        divergence=figures | {"top1_agreement": 0.913, "hidden_errors": [1e-4 * 2**b for b in range(6)]},
        gate=[{"name": word, "value": 0.0412, "relation": "<=", "limit": 0.030000123456789}],
        passed=False,
        text=word,
        command=f"outlierq eval {word}",
    )
    report = Report(
        model=word,
        recipe=word,
        settings={"description": word},
        out=word,
        fingerprint="3f1a9c0e",
        versions={"outlierq": "0.1.0", "torch": word},
        seeds={"calibration": 0},
        machine={"device": word},
        rows=rows,
        transforms=(),
        notes=(word,),
        source_bytes=400,
        output_bytes=100,
        bits_per_weight=4.3,
        quantized_bits_per_weight=4.1,
        source_bits_per_weight=16.0,
        seconds={"calibrate": 61.0, "quantize": 30.0},
        evaluation=evaluation,
        quantized_share=1.0,
    )
    return RunReport(Path("out"), report, (Sample(word, word, word),))


def test_size_loss_and_gate_come_first_and_everything_has_its_place():
    parsed = Page(run_page(made_run()))
    first = "Size 4.00× smaller 400 B before, 100 B after Loss 0.0412 nats per token"
    assert first in parsed.text and "Gate failed over the limit: SmolLM2-135M" in parsed.text
    names = [a["aria-labelledby"] for a in parsed.all("section") if "aria-labelledby" in a]
    assert names == ["plan", "errors-title", "depth-title", "evaluation", "samples", "provenance", "notes"]
    assert {"plan", "errors-title", "depth-title"} <= {a["id"] for _, a in parsed.elements if "id" in a}
    assert len([a for a in parsed.all("svg") if a.get("role") == "img" and a["aria-label"]]) == 7 + 1
    assert "0.32 % at worst, in block 5" in parsed.text, "divergence by depth"
    assert (
        "≤ 0.03" in parsed.text
        and "≤ 0.03000" not in parsed.text
        and "outlierq verify out --source SmolLM2-135M" in parsed.text
    )


def test_a_run_that_was_not_measured_says_how_to_measure_it():
    run = made_run()
    report = Report.from_dict(run.report.to_dict() | {"evaluation": None, "rows": []})
    parsed = Page(run_page(RunReport(run.place, report)))
    assert parsed.text.count("Not measured. A gate, or") == 2 and "No linear was quantized." in parsed.text
    assert "What both say" not in parsed.text and not re.search(r"\b(None|null|nan)\b", parsed.text)


def test_caches_that_were_measured_stand_in_the_page_with_the_flag_that_follows():
    run = made_run()
    assert "Keys and values" not in run_page(run)
    row = CacheRow("int8", "", 8.5, "vllm serve --kv-cache-dtype int8_per_token_head", 0.0021, 0.0001, 12.1)
    other = replace(row, name="int4", kl=None, note="did not run")
    study = CacheStudy("m", "t", 64, 12.0, (row, other), "vllm serve --kv-cache-dtype int8_per_token_head: 8.50 bits")
    report = Report.from_dict(run.report.to_dict() | {"cache": study.to_dict()})
    text = Page(run_page(RunReport(run.place, report))).text
    assert f"Keys and values in fewer bits {study.advice}" in text and f"int8 8.5 0.0021 {row.flag}" in text
    assert "int4 " not in text.partition("Keys and values")[2].partition("What both say")[0]


def test_texts_with_scripts_in_them_stay_texts():
    parsed = Page(run_page(made_run(SCRIPT)))
    assert len(parsed.scripts) == 1 and parsed.all("img") == []
    assert [a for _, a in parsed.elements if any(name.startswith("on") for name in a)] == []
    assert parsed.text.count(SCRIPT) >= 12


def test_the_page_of_a_large_mixture_stays_small():
    assert len(run_page(made_run(blocks=200)).encode()) < 3_000_000


def test_a_real_run_is_shown_and_both_models_answer(outlierq, tiny_llama, tmp_path):
    settings = {**LITTLE, "gate.max_kl": 5.0, "gate.windows": 1, "gate.window_length": 16}
    report = api.quantize(tiny_llama, "gptq-w4", out=tmp_path / "w4", settings=settings, device="cpu")
    answer = outlierq("report", tmp_path / "w4", "--reference", tiny_llama, "--samples", 1, "-q")
    assert answer.code == 0 and answer.err == "" and answer.out == f"written: {tmp_path / 'w4.report.html'}\n"
    parsed = Page((tmp_path / "w4.report.html").read_text())
    assert f"Loss {report.evaluation.kl:.4f} nats per token" in parsed.text and "Gate passed" in parsed.text
    assert f"{PROMPTS[0]} Original" in parsed.text and report.fingerprint in parsed.text
    assert "hidden states" in parsed.text and "gptq int4 g32" in parsed.text


def test_what_is_no_run_is_said_before_anything_is_written(outlierq, tiny_llama, tmp_path):
    answer = outlierq("report", tiny_llama, "-o", tmp_path / "page.html")
    assert answer.code == 1 and "has no outlierq.json" in answer.err and "outlierq quantize" in answer.err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutlierqError, match="prompts for 0 to 8"):
        api.report_page(tiny_llama, out=tmp_path / "page.html", reference=tiny_llama, samples=9)
