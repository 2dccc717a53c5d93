"""Hostile files: every reader answers or refuses; it does not crash, hang, swell, run anything or write elsewhere.

A small, seeded part of `scripts/fuzz.py`, and the corpus of attacks, each of which must be refused.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import fuzz  # noqa: E402
from fuzz_readers import READERS, SLOW  # noqa: E402

CORPUS = ROOT / "tests" / "corpus"
CASES = sorted(path.relative_to(CORPUS) for path in CORPUS.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    """What reads may do; the hook stays in the process, but sees nothing after this."""
    before = signal.signal(signal.SIGPROF, fuzz.stop)
    yield fuzz.Watch(tmp_path_factory.mktemp("fuzz"))
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore")
def test_changed_files_are_read_or_refused(reader, watch, tmp_path):
    watch.homes = (str(tmp_path), *watch.homes[1:])
    result = fuzz.fuzz(reader, 60, seed=1, folder=tmp_path / reader, watch=watch, keep=False)
    assert result["findings"] == []
    assert result["accepted"] + result["refused"] == 60
    assert result["refused"] > 5, "the changes do no harm"


@pytest.mark.parametrize("reader", SLOW)
@pytest.mark.filterwarnings("ignore")
def test_changed_files_of_slow_readers_are_read_or_refused(reader, watch, tmp_path):
    watch.homes = (str(tmp_path), *watch.homes[1:])
    result = fuzz.fuzz(reader, 5, seed=1, folder=tmp_path / reader, watch=watch, keep=False)
    assert result["findings"] == [] and result["accepted"] + result["refused"] == 5


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore")
def test_what_hypothesis_thinks_of_is_read_or_refused(reader, watch, tmp_path):
    """Hypothesis makes the choices of the changes, or all of the bytes; a finding comes out as small as it can."""
    watch.homes = (str(tmp_path), *watch.homes[1:])
    target = fuzz.Target(reader, tmp_path / reader, watch)
    target.warm_up()
    valid = target.reader.seeds()

    @settings(max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategies.randoms(use_true_random=False).map(partial(target.input, valid)) | strategies.binary(max_size=99))
    def read(case):
        assert target.read(case) is None

    read()
    assert target.counts["refused"] > 0


def test_the_corpus_holds_cases_of_every_kind():
    assert len(CASES) > 100
    assert {"safetensors", "index", "config", "packed", "gguf-header", "recipe", "report", "stats", "journal"} <= {
        case.parts[0] for case in CASES
    }


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_an_attack_is_refused(case, watch, tmp_path):
    watch.homes = (str(tmp_path), *watch.homes[1:])
    target = fuzz.Target(case.parts[0], tmp_path / case.parts[0], watch)
    assert target.read((CORPUS / case).read_bytes()) is None
    if not case.name.startswith("found-"):
        assert target.counts["refused"] == 1


def test_the_watch_sees_what_is_forbidden(watch, tmp_path):
    """A check that cannot fail is none."""
    with watch.watching() as seen:
        os.system("true")
        with pytest.raises(OSError), open("/proc/none", "w"):
            pass
    assert [event.split()[0] for event in seen] == ["os.system", "/proc/none"]


def test_a_reader_that_fails_hangs_or_swells_is_found(watch, tmp_path, monkeypatch):
    def endless(_folder):
        while True:
            pass

    def swell(_folder):
        # More than this process ever had, whatever ran in it before.
        bytearray(b"x") * (fuzz.peak_bytes() + fuzz.MEMORY)

    def crash(_folder):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "MEMORY", 32 << 20)
    watch.homes = (str(tmp_path), *watch.homes[1:])
    target = fuzz.Target("text", tmp_path / "text", watch)
    for read, said in ((endless, "more than 0.2 s"), (crash, "KeyError"), (swell, "MiB for 1 bytes")):
        target.reader = replace(target.reader, read=read)
        monkeypatch.setattr(fuzz, "SECONDS", 0.2 if read is endless else 5)
        assert said in (target.read(b"x") or "")


class TestNothingRuns:
    """Code that comes with a checkpoint."""

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__ }}",
            "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
            "{% for a in range(10 ** 12) %}x{% endfor %}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{{ raise_exception('no') }}",
            "{% import 'os' as os %}",
            "{{ 1 / 0 }}",
        ],
    )
    def test_a_chat_template_with_code_is_refused(self, template, tmp_path, tools, watch, monkeypatch):
        from transformers import AutoTokenizer

        from outlierq.calibrate.text import chats, windows
        from outlierq.core.errors import StatsError

        monkeypatch.setattr(chats, "SECONDS_PER_CHAT", 0.2)
        monkeypatch.chdir(tmp_path)
        tools.write_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        tokenizer.chat_template = template
        (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 4)
        with watch.watching() as seen, pytest.raises(StatsError, match="chat template"):
            windows.token_windows(
                tokenizer, str(tmp_path / "chats.jsonl"), samples=1, sequence_length=4, seed=0, chat_template=True
            )
        assert seen == [] and not (tmp_path / "pwned").exists()

    def test_a_config_that_asks_for_its_own_code_is_refused_and_the_code_not_run(self, llama_copy, outlierq):
        (llama_copy / "modeling_mine.py").write_text("raise SystemExit(77)\n")
        config = json.loads((llama_copy / "config.json").read_text())
        mine = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
        (llama_copy / "config.json").write_text(json.dumps(config | mine))
        answer = outlierq("plan", llama_copy, "-r", "rtn-w4")
        assert answer.code == 1 and "brings its own model code (modeling_mine.py)" in answer.err

    def test_a_tokenizer_that_asks_for_its_own_code_is_refused_and_the_code_not_run(self, llama_copy):
        from outlierq.core.errors import SourceError
        from outlierq.load import load_tokenizer, open_checkpoint

        (llama_copy / "tokenization_mine.py").write_text("raise SystemExit(77)\n")
        path = llama_copy / "tokenizer_config.json"
        mine = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | mine))
        with pytest.raises(SourceError, match="tokenizer of"):
            load_tokenizer(open_checkpoint(str(llama_copy)))


class TestAbsurdSizes:
    """Files that are refused by their size, before they are read. They are sparse: nothing is on the disk."""

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_a_json_file_of_a_terabyte_is_refused(self, llama_copy, name):
        from outlierq.core.errors import SourceError
        from outlierq.load import open_checkpoint

        if name != "config.json":
            (llama_copy / "model.safetensors").unlink()
        with open(llama_copy / name, "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(SourceError, match=r"has 1099511627776 bytes; more than \d+ are not read"):
            open_checkpoint(str(llama_copy))

    def test_a_tokenizer_of_a_terabyte_is_refused(self, llama_copy):
        from outlierq.core.errors import SourceError
        from outlierq.load import open_checkpoint
        from outlierq.load.token_text import token_texts

        with open(llama_copy / "tokenizer.json", "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(SourceError, match=r"has 1099511627776 bytes"):
            token_texts(open_checkpoint(str(llama_copy)), [1])
