"""What the pages of README and docs say that can be tried: blocks, command lines, links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
BESIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "examples/own-method/README.md")
PAGES = [*DOCS, *(ROOT / name for name in BESIDE)]
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[\w-]*) *$")
CODE = re.compile(r"`+[^`]*`+")
LINK = re.compile(r"(?<!\\)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?(?P<target>[^)\s>]+)>?(?: \"[^\"]*\")?\)")


def name_of(page: Path) -> str:
    """The path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A block of code. language: the word behind the fence, empty without one. line: of its first line, from 1."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command line of a page, without its comment."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line} {shlex.join(self.words)}"


@cache
def blocks(page: Path) -> list[Block]:
    """Every block of code: between fences, or indented by four spaces behind an empty line that is in no list."""
    found, lines, number = [], page.read_text().splitlines(), 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        start = number + 1
        if fence:
            number = next(n for n in range(start, len(lines)) if lines[n].strip() == fence["ticks"])
            text = "\n".join(line.removeprefix(fence["indent"]) for line in lines[start:number])
            found.append(Block(fence["language"], text, start + 1))
        elif lines[number].startswith("    ") and starts_block(lines, number):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            text = "\n".join(line[4:] for line in lines[start - 1 : number + 1])
            found.append(Block("", text, start))
        number += 1
    return found


def starts_block(lines: list[str], number: int) -> bool:
    """Whether an indented line begins a block: an empty line lies before it, and before that no item of a list."""
    if number == 0 or lines[number - 1].strip():
        return False
    before = next((line for line in reversed(lines[:number]) if line.strip()), "")
    return not re.match(r" *([-*+]|\d+\.) |  ", before)


@cache
def prose(page: Path) -> list[tuple[int, str]]:
    """The lines that are in no block, with their numbers from 1."""
    lines = list(enumerate(page.read_text().splitlines(), start=1))
    for block in blocks(page):
        inside = range(block.line, block.line + block.text.count("\n") + 1)
        lines = [(number, line) for number, line in lines if number not in inside]
    return [(number, line) for number, line in lines if not FENCE.match(line)]


def commands(page: Path, programs: set[str]) -> list[Command]:
    """Every line of a block that calls one of the programs, as words; a line that ends in a backslash goes on."""
    found = []
    for block in blocks(page):
        if block.language in ("", "bash"):
            found += [Command(page, line, words) for line, words in calls(block) if words[0] in programs]
    return found


def calls(block: Block) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The lines of a block as words, with their numbers; without comments, and without variables set before a call."""
    joined = block.text.replace("\\\n", "  ")
    number = block.line
    for line in joined.splitlines():
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:  # a quote without its other: no command
            words = []
        while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=\S*", words[0]):
            words = words[1:]
        if words:
            yield number, tuple(words)
        number += 1


def links(page: Path) -> list[tuple[int, str]]:
    """The targets of all links and pictures, with the line of each."""
    return [(number, link["target"]) for number, line in prose(page) for link in LINK.finditer(line)]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of all headings, as GitHub makes them, and as the site does."""
    found: set[str] = set()
    for _number, line in prose(page):
        heading = re.match(r"#+ +(?P<text>.*)", line)
        if heading:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading["text"].replace("`", ""))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            count = sum(1 for each in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each))
            found.add(f"{slug}-{count}" if count else slug)
    return found


def inline_code(page: Path) -> list[tuple[int, str]]:
    """What stands between backticks in prose, with its line."""
    return [(number, code.strip("`").strip()) for number, line in prose(page) for code in CODE.findall(line)]
