"""Commands of other programs that pages and `recommend` name: their options exist, and the model is one that is there.

`foreign_programs.json` says what each program takes, of which version, and when that was looked up. Those that run here
are run by tests/clients.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from doc_pages import PAGES, blocks

from outlierq.pipeline.advising.hardware import card_of
from outlierq.pipeline.advising.recommend import _running
from outlierq.pipeline.studying.caches import SERVED

PROGRAMS = json.loads((Path(__file__).parent / "foreign_programs.json").read_text())
NAMES = sorted(PROGRAMS, key=len, reverse=True)
# What pages call a checkpoint that their own lines above have made.
MODELS = re.compile(r"\./(out|Llama-3\.1-8B|tiny[\w-]*)|llama-[\w.-]+\.gguf|\./model-q4_k_s\.gguf")


def lines_of(text: str) -> list[str]:
    """The calls of other programs in a text, each on one line."""
    joined = re.sub(r"\\\n\s*", " ", text)
    starts = "|".join(map(re.escape, NAMES))
    return re.findall(rf"^ *((?:[A-Z]\w*=\S* )*(?:{starts}) .*)$", joined, re.MULTILINE)


def shown() -> list[str]:
    """Every such line of every page."""
    return [line for page in PAGES for block in blocks(page) for line in lines_of(block.text)]


def faults(line: str) -> list[str]:
    """What a program would not understand of its line."""
    words = shlex.split(line, comments=True)
    settings = [word.partition("=")[0] for word in words if re.match(r"[A-Z]\w*=", word)]
    words = words[len(settings) :]
    name = next(name for name in NAMES if words[: len(name.split())] == name.split())
    facts, words = PROGRAMS[name], words[len(name.split()) :]
    said = [f"{each}: no setting of {name}" for each in settings if each not in facts.get("environment", ())]
    plain, at = [], 0
    while at < len(words):
        word = words[at]
        takes = facts["options"].get(word)
        if not word.startswith("-"):
            plain.append(word)
        elif word not in facts["options"]:
            said.append(f"{name} has no option {word}")
        elif takes is not None:
            at += 1
            if takes and words[at] not in takes:
                said.append(f"{word} of {name} does not take {words[at]}")
            if word == facts.get("model"):
                plain.insert(0, words[at])
        at += 1
    if "model" in facts and not (plain and MODELS.fullmatch(plain[0])):
        said.append(f"{name} is given no model: {line}")
    return said


@pytest.mark.parametrize("line", shown())
def test_a_command_of_a_page_is_one_that_its_program_understands(line):
    assert faults(line) == []


def test_each_program_is_shown_somewhere_and_its_facts_are_dated():
    assert {name for name in PROGRAMS for line in shown() if f"{name} " in line} == set(PROGRAMS)
    for facts in PROGRAMS.values():
        assert facts["version"] and facts["of"] and re.fullmatch(r"202\d-\d\d-\d\d", facts["looked_up"])


@pytest.mark.parametrize("words", [served[2] for served in SERVED.values()])
def test_the_flag_that_a_study_of_caches_advises_exists(words):
    assert faults(words.replace("vllm serve", "vllm serve ./out")) == []


@pytest.mark.parametrize(("client", "gpu"), [("vllm", "L4"), ("vllm", "cpu"), ("llama.cpp", "cpu")])
def test_the_command_that_recommend_names_to_run_a_result_is_understood(client, gpu):
    out = "model-q4_k_s.gguf" if client == "llama.cpp" else "out"
    assert faults(_running(client, card_of(gpu), out)) == []


def test_a_command_that_its_program_would_refuse_is_noticed():
    assert faults("vllm serve ./out --dtyp bfloat16") and faults("vllm serve --dtype bfloat16")
    assert faults("llama-cli -m gone") and faults("VLLM_CACHE=2 vllm serve ./out")


def test_what_was_not_tried_is_said_to_be_so_with_its_date():
    page = (Path(__file__).parents[1] / "docs" / "serve.md").read_text()
    section = page[page.index("## SGLang") :].split("\n## ")[0]
    assert "Not tried" in section and PROGRAMS["python -m sglang.launch_server"]["looked_up"] in section
