"""Measurements as artifacts: what is written down, what is kept, and what `quantize` and `eval` do with a gate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from outlierq.core.errors import OutlierqError
from outlierq.core.report import Report
from outlierq.load import open_checkpoint
from outlierq.pipeline.measuring import cache as result_cache
from outlierq.pipeline.measuring import measure as results
from outlierq.pipeline.measuring import models as evaluation
from outlierq.pipeline.measuring.measure import Measurement, measure

SMALL = ("-s", "gate.windows=2", "-s", "gate.window_length=32")
WINDOWS = ("--windows", 2, "--window-length", 32)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def faked(cache, monkeypatch) -> SimpleNamespace:
    """Models and measurements that cost nothing, and a count of how often each was asked for."""
    asked = SimpleNamespace(loaded=[], text=0, tasks=[])

    def load(checkpoint, **_options):
        asked.loaded.append(checkpoint.source)
        return checkpoint.source

    def text(*_arguments, **_options):
        asked.text += 1
        return SimpleNamespace(to_dict=lambda: {"perplexity": 10.0, "reference_perplexity": None, "seconds": 1.0})

    def tasks(model, _tokenizer, names, **options):
        asked.tasks.append((model, tuple(names), options))
        return {"rows": [{"task": name, "metric": "acc", "value": 0.5} for name in names]}

    monkeypatch.setattr(evaluation, "load_for_evaluation", load)
    windows = SimpleNamespace(ids=torch.zeros(1, 2), opening="", hidden_from=lambda model: None)
    monkeypatch.setattr(evaluation, "checked_windows", lambda *_, **__: windows)
    monkeypatch.setattr(evaluation, "check_tasks", lambda *_: None)
    monkeypatch.setattr(evaluation, "check_continues", lambda *_: None)
    monkeypatch.setattr(evaluation, "measure_windows", text)
    monkeypatch.setattr(evaluation, "run_tasks", tasks)
    return asked


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of task data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "?"}\n')
    return tmp_path / "data"


def opened(folder) -> object:
    return open_checkpoint(str(folder))


class TestCache:
    """The same question is answered once; any other question is asked again."""

    def test_the_second_time_nothing_is_loaded_or_run(self, faked, llama_copy, data):
        wanted = Measurement(tasks=("mmlu",), data_dir=data)
        first = measure(opened(llama_copy), None, wanted)
        assert first["from_cache"] == [] and len(faked.loaded) == 1 and faked.text == 1 and len(faked.tasks) == 1
        second = measure(opened(llama_copy), None, wanted)
        assert second["from_cache"] == ["divergence", "tasks"]
        assert len(faked.loaded) == 1 and faked.text == 1 and len(faked.tasks) == 1
        assert {**second, "from_cache": []} == first
        measure(opened(llama_copy), None, wanted, cached=False)
        assert faked.text == 2 and len(faked.tasks) == 2

    def test_the_original_is_measured_once_for_all_its_copies(self, faked, llama_copy, tiny_llama, untied_llama, data):
        wanted = Measurement(tasks=("mmlu",), data_dir=data)
        (llama_copy / "config.json").write_text((llama_copy / "config.json").read_text() + " ")
        measure(opened(untied_llama), opened(tiny_llama), wanted)
        again = measure(opened(llama_copy), opened(tiny_llama), wanted)
        assert again["from_cache"] == ["reference_tasks"]
        assert [model for model, _, _ in faked.tasks].count(str(tiny_llama)) == 1

    def test_a_copy_elsewhere_is_the_same_checkpoint(self, faked, tiny_llama, llama_copy):
        measure(opened(tiny_llama), None, Measurement())
        assert measure(opened(llama_copy), None, Measurement())["from_cache"] == ["divergence"]

    @pytest.mark.parametrize("part", ["last byte of the weights", "tokenizer", "config"])
    def test_any_changed_byte_asks_again(self, faked, llama_copy, part):
        measure(opened(llama_copy), None, Measurement())
        file = {"tokenizer": "tokenizer_config.json", "config": "config.json"}.get(part, "model.safetensors")
        raw = bytearray((llama_copy / file).read_bytes())
        raw = raw[:-1] + bytes([raw[-1] ^ 1]) if file.endswith("safetensors") else raw + b"\n"
        (llama_copy / file).write_bytes(raw)
        assert measure(opened(llama_copy), None, Measurement())["from_cache"] == []

    def test_cards_licences_and_reports_do_not_matter(self, faked, llama_copy):
        measure(opened(llama_copy), None, Measurement())
        (llama_copy / "README.md").write_text("other words")
        (llama_copy / "outliers.json").write_text("{}")
        (llama_copy / "outlierq.json").write_text("{}")
        assert measure(opened(llama_copy), None, Measurement())["from_cache"] == ["divergence"]

    @pytest.mark.parametrize(
        "change",
        [{"limit": 3}, {"num_fewshot": 2}, {"batch_size": 2}, {"tasks": ("arc_easy",)}, {"dtype": "bfloat16"}],
        ids=lambda change: next(iter(change)),
    )
    def test_any_changed_setting_of_tasks_asks_again(self, faked, tiny_llama, data, change):
        settings = {"tasks": ("mmlu",), "data_dir": data}
        measure(opened(tiny_llama), None, Measurement(**settings))
        assert "tasks" not in measure(opened(tiny_llama), None, Measurement(**{**settings, **change}))["from_cache"]
        assert faked.tasks[0][1] == ("mmlu",) and set(faked.tasks[0][2]) == {
            "data_dir", "limit", "num_fewshot", "batch_size", "max_length",
        }  # fmt: skip

    def test_changed_data_and_changed_versions_ask_again(self, faked, tiny_llama, data, monkeypatch):
        wanted = Measurement(tasks=("mmlu",), data_dir=data)
        measure(opened(tiny_llama), None, wanted)
        (data / "test.jsonl").write_text('{"question": "!"}\n')
        assert measure(opened(tiny_llama), None, wanted)["from_cache"] == ["divergence"]
        monkeypatch.setattr(results, "versions", lambda: {"torch": "9"})
        assert measure(opened(tiny_llama), None, wanted)["from_cache"] == []

    def test_a_broken_entry_is_no_answer(self, faked, cache, tiny_llama):
        measure(opened(tiny_llama), None, Measurement())
        (entry,) = (cache / "results").iterdir()
        entry.write_text("{")
        assert measure(opened(tiny_llama), None, Measurement())["from_cache"] == []
        assert json.loads(entry.read_text())

    def test_a_failed_measurement_is_not_kept(self, faked, cache, tiny_llama, data, monkeypatch):
        def broken(*_arguments, **_options):
            raise OutlierqError("no")

        monkeypatch.setattr(evaluation, "run_tasks", broken)
        with pytest.raises(OutlierqError):
            measure(opened(tiny_llama), None, Measurement(tasks=("mmlu",), data_dir=data))
        assert len(list((cache / "results").iterdir())) == 1, "the text was measured, the tasks were not"

    def test_the_cache_lies_where_the_user_says(self, monkeypatch, tmp_path):
        monkeypatch.delenv("OUTLIERQ_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert result_cache.cache_folder() == tmp_path / "outlierq"

    def test_a_data_folder_without_data_is_said(self, tmp_path):
        with pytest.raises(OutlierqError, match="holds no data files"):
            result_cache.data_hash(tmp_path)


class TestQuantize:
    """A gate in the recipe or on the command line of `quantize`."""

    def test_a_passed_gate_is_in_the_report_and_in_junit(self, outlierq, cache, tiny_llama, tmp_path):
        words = ("-r", "rtn-w8", "-o", tmp_path / "out", *SMALL, "--max-kl", 1, "--max-perplexity-increase", "50%")
        answer = outlierq("quantize", tiny_llama, *words, "--junit", tmp_path / "gate.xml", "-q")
        assert answer.code == 0 and "passed" in answer.out
        report = Report.from_dict(json.loads((tmp_path / "out" / "outlierq.json").read_text()))
        assert report.evaluation["passed"] and len(report.evaluation["gate"]) == 2
        assert report.settings["gate"]["max_perplexity_increase"] == 0.5
        assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "0"

    def test_a_failed_gate_exits_with_3_with_its_table_and_keeps_the_checkpoint(
        self, outlierq, cache, tiny_llama, tmp_path
    ):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            "quantize: {method: rtn, bits: 2, group_size: 32}\ngate: {max_kl: 0.0, windows: 2, window_length: 32}\n"
        )
        words = ("-r", recipe, "-o", tmp_path / "out", "--junit", tmp_path / "gate.xml", "-q", "--json")
        answer = outlierq("quantize", tiny_llama, *words)
        assert answer.code == 3 and "FAILED  KL divergence per token" in answer.err
        assert json.loads(answer.out)["evaluation"]["passed"] is False
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "1"

    def test_a_limit_on_the_command_line_replaces_the_recipes(self, outlierq, cache, tiny_llama, tmp_path):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text("quantize: {method: rtn}\ngate: {max_kl: 0.0, windows: 2, window_length: 32}\n")
        words = ("-r", recipe, "-o", tmp_path / "out", "-q", "--max-kl", 9)
        assert outlierq("quantize", tiny_llama, *words).code == 0

    def test_wrong_limits_are_wrong_usage_before_any_work(self, outlierq, tiny_llama, tmp_path):
        for words in (("--max-perplexity-increase", "much"), ("--min-task", "mmlu"), ("--junit", "x.xml")):
            answer = outlierq("quantize", tiny_llama, "-o", tmp_path / "out", *words)
            assert answer.code == 2 and words[0] in answer.err
        assert not (tmp_path / "out").exists()


class TestEval:
    """`outlierq eval` as a CI job sees it."""

    def test_the_artifact_says_everything_that_is_needed_to_repeat_it(self, outlierq, cache, tiny_llama, tmp_path):
        words = (tiny_llama, "--reference", tiny_llama, *WINDOWS, "--max-kl", 0, "-o", tmp_path / "r.json", "-q")
        assert outlierq("eval", *words).code == 0
        found = json.loads((tmp_path / "r.json").read_text())
        assert found["command"].startswith(f"outlierq eval {tiny_llama} --reference") and found["passed"] is True
        assert found["conditions"]["windows"] == 2 and found["dtype"] == "float32" and found["device"].startswith("cpu")
        assert len(found["text_sha256"]) == 64 and set(found["content_hash"]) == {"model", "reference"}
        assert found["versions"].keys() >= {"outlierq", "torch", "transformers", "lm-eval", "python"}

    def test_results_are_recorded_where_publish_reads_them(self, outlierq, cache, tiny_llama, tmp_path):
        out = tmp_path / "out"
        outlierq("quantize", tiny_llama, "-r", "rtn-w8", "-o", out, "-q")
        words = ("eval", out, "--reference", tiny_llama, *WINDOWS, "--max-kl", 1, "--record", "-q")
        assert outlierq(*words).code == 0
        report = Report.from_dict(json.loads((out / "outlierq.json").read_text()))
        assert report.evaluation["passed"] and report.rows
        assert outlierq("publish", out, "me/x", "--base-model", "none", "--dry-run", "-q").code == 0
        again = outlierq(*words[:-1])
        assert "taken from the cache: divergence" in again.err
        answer = outlierq("eval", tiny_llama, *WINDOWS, "--record", "-q")
        assert answer.code == 1 and "no result of `outlierq quantize`" in answer.err

    def test_tasks_are_run_before_and_after_and_judged(self, outlierq, faked, llama_copy, tiny_llama, data):
        (llama_copy / "config.json").write_text((llama_copy / "config.json").read_text() + " ")
        words = (llama_copy, "--reference", tiny_llama, "--min-task", "mmlu:-1", "--data-dir", data, "--json", "-q")
        answer = outlierq("eval", *words)
        assert answer.code == 0, answer.err
        found = json.loads(answer.out)
        assert found["tasks"]["rows"] and found["reference_tasks"]["rows"] and found["gate"][0]["value"] == 0
        assert outlierq("eval", *words, "--min-task", "mmlu:60").code == 3

    @pytest.mark.parametrize("limit", [("--max-kl", 1), ("--min-task", "mmlu:-1"), ("--min-top1", "90%")])
    def test_limits_against_an_original_need_one(self, outlierq, tiny_llama, limit):
        answer = outlierq("eval", tiny_llama, *limit)
        assert answer.code == 2 and "--reference" in answer.err


class TestVllm:
    """`--backend vllm`: only what is handed over; vLLM itself is not run here."""

    def test_it_is_refused_with_a_hint_where_it_is_not_installed(self, outlierq, tiny_llama):
        answer = outlierq("eval", tiny_llama, "--tasks", "mmlu", "--backend", "vllm")
        assert answer.code == 1 and "vllm is not installed" in answer.err and "pip install vllm" in answer.err
        assert outlierq("eval", tiny_llama, "--backend", "vlm").code == 2

    def test_the_folder_is_handed_over_and_our_loader_is_not_asked(self, faked, tiny_llama, data):
        measure(opened(tiny_llama), None, Measurement(tasks=("mmlu",), data_dir=data, backend="vllm"))
        served, _, _ = faked.tasks[0]
        assert served.folder == tiny_llama
        assert faked.loaded == [str(tiny_llama)], "for the text, not for the tasks"
        measure(opened(tiny_llama), None, Measurement(tasks=("mmlu",), data_dir=data))
        assert len(faked.tasks) == 2, "another backend is another question"


class TestKeptResults:
    """The cache of results costs nobody a measurement, and is believed only as it was written."""

    @pytest.mark.parametrize(
        "entry", [b"5", b'"x"', b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"measured": {"perplexity": 1.0}}', b""]
    )
    def test_an_entry_that_is_no_measurement_is_measured_again(self, entry, faked, llama_copy, cache):
        first = measure(opened(llama_copy), None, Measurement())
        for place in (cache / "results").iterdir():
            place.write_bytes(entry)
        again = measure(opened(llama_copy), None, Measurement())
        assert again == first and faked.text == 2

    def test_a_figure_that_was_changed_is_not_believed(self, faked, llama_copy, cache):
        measure(opened(llama_copy), None, Measurement())
        (place,) = (cache / "results").iterdir()
        place.write_text(place.read_text().replace("10.0", "1.0"))
        again = measure(opened(llama_copy), None, Measurement())
        assert again["divergence"]["perplexity"] == 10.0 and again["from_cache"] == []

    @pytest.mark.parametrize("kind", ["a file", "below a file", "a link to nowhere"])
    def test_a_cache_that_cannot_be_written_costs_a_note(self, kind, faked, llama_copy, tmp_path, monkeypatch):
        blocked = tmp_path / "blocked"
        blocked.symlink_to(tmp_path / "no" / "where") if kind == "a link to nowhere" else blocked.write_text("")
        monkeypatch.setenv("OUTLIERQ_CACHE", str(blocked / "below" if kind == "below a file" else blocked))
        found = measure(opened(llama_copy), None, Measurement())
        assert found["divergence"]["perplexity"] == 10.0
        assert len(found["notes"]) == 1 and "was not kept for the next time" in found["notes"][0]


def test_a_gguf_file_is_held_against_its_gate(llama_copy, tmp_path):
    import outlierq

    tokenizer = json.loads((llama_copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"] = 259
    tokenizer["model"]["merges"] = [["a", "b"]]  # without merges the file holds no tokenizer that can be read back
    (llama_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = {
        "quantize": {"method": "rtn", "type": "Q8_0"},
        "export": {"format": "gguf"},
        "gate": {"max_kl": 0.1, "windows": 1, "window_length": 32},
    }
    report = outlierq.quantize(llama_copy, recipe, out=tmp_path / "out", device="cpu")
    assert report.evaluation.passed and 0 < report.evaluation.kl < 0.1
    assert (tmp_path / "out" / "model.gguf").is_file()
