"""Readers for `build_text.py`: a folder of a package's files becomes works, each a title and its paragraphs.

A work is what is held out as one: an article, a chapter, a page in all its languages, a file of code.
"""

from __future__ import annotations

import bz2
import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import yaml


class Work(NamedTuple):
    """topic: works of the same topic are held out together (a page and its translations)."""

    topic: str
    paragraphs: list[str]


# What an article of an encyclopedia ends with.
APPENDICES = {"see also", "references", "external links", "notes", "further reading", "bibliography", "footnotes"}
SKIPPED = {"script", "style", "nav", "header", "footer", "head", "svg", "button"}
BESIDE = {"navheader", "navfooter", "sphinxsidebar", "related"}
BLOCKS = {"p", "li", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "div", "section", "td", "tr"}


def plain(folder: Path, pattern: str) -> Iterator[Work]:
    """Files of text, one work each; lines of a paragraph as they are."""
    for path in sorted(folder.glob(pattern)):
        yield Work(path.name, _paragraphs(path.read_text("utf-8", errors="strict")))


def code(folder: Path, pattern: str) -> Iterator[Work]:
    """Source files; what stands between blank lines is a paragraph. Licence headers are left out."""
    for path in sorted(folder.glob(pattern)):
        text = path.read_text("utf-8", errors="replace")
        parts = [part for part in re.split(r"\n{2,}", text.replace("\r\n", "\n")) if part.strip()]
        if len(text) > 1500 and not any(len(line) > 400 for line in text.split("\n")):
            blocks = [part.strip("\n") for part in parts if not re.search(r"copyright|@generated", part, re.I)]
            yield Work(path.name, blocks)


def page(folder: Path, pattern: str) -> Iterator[Work]:
    """Pages of HTML."""
    for path in sorted(folder.glob(pattern)):
        yield Work(path.stem, _html_paragraphs(path.read_text("utf-8", errors="replace")))


def restructured(folder: Path, pattern: str) -> Iterator[Work]:
    """Pages of reStructuredText, as written."""
    for path in sorted(folder.glob(pattern)):
        text = path.read_text("utf-8")
        if len(text) > 2000 and text.count("autofunction") + text.count("autoclass") < 8:
            yield Work(path.name, _paragraphs(text))


def mallard(folder: Path, pattern: str) -> Iterator[Work]:
    """Help pages of GNOME in one language: what is translated of them. The topic is a page's name in every language."""
    for path in sorted(folder.glob(pattern)):
        language = path.parents[1].name
        english = path.parents[2] / "C/gnome-help" / path.name
        untranslated = set(_help_paragraphs(english)) if language != "C" and english.exists() else set()
        yield Work(path.stem, [part for part in _help_paragraphs(path) if part not in untranslated])


def _help_paragraphs(path: Path) -> list[str]:
    """Titles and paragraphs of a page in Mallard, without credits."""
    text = re.sub(r"<info>.*?</info>", "", path.read_text("utf-8"), flags=re.S)
    parts = re.findall(r"<(?:p|title)\b[^>]*>(.*?)</(?:p|title)>", text, re.S)
    words = [" ".join(html.unescape(re.sub(r"<[^>]*>", "", part)).split()) for part in parts]
    return [part for part in words if part]


def wikipedia(folder: Path, pattern: str) -> Iterator[Work]:
    """Articles of a dump; what is left of them is their headings and running text."""
    for path in sorted(folder.glob(pattern)):
        dump = bz2.decompress(path.read_bytes()).decode("utf-8")
        for entry in re.findall(r"<page>(.*?)</page>", dump, re.S):
            title, text = re.search(r"<title>(.*?)</title>", entry), re.search(r"<text[^>]*>(.*?)</text>", entry, re.S)
            if title and text and "<redirect" not in entry and ":" not in title[1] and "disambig" not in title[1]:
                yield Work(html.unescape(title[1]), _wiki_paragraphs(html.unescape(text[1])))


def factbook(folder: Path, pattern: str) -> Iterator[Work]:
    """Countries of the World Factbook: what is told in sentences."""
    for path in sorted(folder.glob(pattern)):
        if path.parent.name not in ("meta", "oceans"):
            parts = [" ".join(text.replace("++", " ").split()) for text in _values(json.loads(path.read_text("utf-8")))]
            yield Work(path.name, [part for part in parts if len(part) > 160])


def dictionary(folder: Path, pattern: str) -> Iterator[Work]:
    """A dictd data base: entries a blank line apart, a work for each of them that is longer than a line."""
    for path in sorted(folder.glob(pattern)):
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        for entry in re.split(r"\n(?=[^\s].*\n)", text)[40:]:
            if len(entry) > 500:
                yield Work(entry[:30].strip(), _paragraphs(re.sub(r"\n {4}", "\n", entry)))


def dialogues(folder: Path, pattern: str) -> Iterator[Work]:
    """Conversations of the ChatterBot corpus: two who speak in turn."""
    for path in sorted(folder.glob(pattern)):
        turns = [
            "\n".join(f"{('User', 'Assistant')[i % 2]}: {str(line).strip()}" for i, line in enumerate(conversation))
            for conversation in yaml.safe_load(path.read_text("utf-8")).get("conversations") or []
        ]
        yield Work(path.stem, list(dict.fromkeys(turns)))


def problems(folder: Path, pattern: str) -> Iterator[Work]:
    """Problems of competitions, each with its solution step by step."""
    for path in sorted(folder.glob(pattern)):
        for name, problem in json.loads(path.read_text("utf-8"))["problems"].items():
            steps = [re.sub(r"@@(.*?)@@", r"$\1$", step["_raw_text"]) for step in problem["solution"]["steps"]]
            asked = re.sub(r"@@(.*?)@@", r"$\1$", problem["_raw_text"])
            yield Work(name, [f"Problem. {asked}", "Solution. " + "\n".join(steps)])


def theorems(folder: Path, pattern: str) -> Iterator[Work]:
    """Theorems of a Metamath data base: what each says in words and in symbols. Proofs are left out."""
    for path in sorted(folder.glob(pattern)):
        text = path.read_text("utf-8")
        parts = re.findall(r"\$\( ((?:(?!\$\)).){200,}?)\$\)\n\s*(\S+ \$p .*?) \$=", text, re.S)
        words = [f"{' '.join(said.split())}\n{' '.join(shown.split())}" for said, shown in parts]
        for i in range(0, len(words), 12):
            yield Work(f"theorems {i}", words[i : i + 12])


def novels(folder: Path, pattern: str) -> Iterator[Work]:
    """Novels of a lazily loaded R data base: each entry of the .rdb is the compressed vector of a book's lines."""
    for path in sorted(folder.glob(pattern)):
        rest = path.read_bytes()
        while len(rest) > 4:
            entry = zlib.decompressobj()
            lines = _r_strings(entry.decompress(rest[4:]))  # the length of the whole stands before it
            rest = entry.unused_data
            chapters = re.split(r"\n(?=CHAPTER |Chapter )", "\n".join(lines))[1:]
            yield from (Work(f"{lines[0]} {number}", _joined(text)) for number, text in enumerate(chapters))


def _r_strings(content: bytes) -> list[str]:
    """The strings of a serialized character vector of R (XDR): flags ending in 9, a length, the bytes."""
    strings, at = [], content.find(b"\x00\x00\x00\x10")
    at += 8
    while 0 <= at <= len(content) - 8 and content[at + 3] == 9:
        size = int.from_bytes(content[at + 4 : at + 8], "big", signed=True)
        strings.append(content[at + 8 : at + 8 + max(size, 0)].decode("utf-8", errors="replace"))
        at += 8 + max(size, 0)
    return strings


def _paragraphs(text: str) -> list[str]:
    """What stands between blank lines."""
    return [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")) if part.strip()]


def _joined(text: str) -> list[str]:
    """Paragraphs of a wrapped text, each on one line."""
    return [" ".join(part.split()) for part in _paragraphs(text)]


def _values(tree: object) -> Iterator[str]:
    """Every text below a tree of JSON."""
    if isinstance(tree, str):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _values(value)


def _innermost_removed(text: str, opening: str, closing: str) -> str:
    """The text without what stands between the two, nested as it may be."""
    pattern = re.compile(rf"{opening}(?:(?!{opening}|{closing}).)*?{closing}", re.S)
    while True:
        text, count = pattern.subn("", text)
        if not count:
            return text


def _wiki_paragraphs(text: str) -> list[str]:
    """The running text of an article in wiki markup, up to its appendices."""
    text = re.sub(r"<!--.*?-->|<math.*?</math>|<gallery.*?</gallery>", "", text, flags=re.S)
    text = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>", "", text, flags=re.S)
    text = _innermost_removed(text, r"\{\{", r"\}\}")
    text = _innermost_removed(text, r"\{\|", r"\|\}")
    text = re.sub(r"\[\[(?:[^\[\]|:]*\|)?([^\[\]|:]*)\]\]", r"\1", text)
    text = _innermost_removed(text, r"\[\[", r"\]\]")
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|</?[a-z][^>]*>", "", text).replace("&nbsp;", " ")
    parts: list[str] = []
    for line in text.split("\n"):
        heading = re.match(r"=+\s*(.*?)\s*=+\s*$", line)
        if heading and heading[1].lower() in APPENDICES:
            break
        if heading:
            parts.append(heading[1])
        elif len(line) > 120 and line[0] not in "*#:;|!{}<":
            parts.append(" ".join(line.replace("()", "").split()).replace(" ,", ","))
    # A heading with nothing below it says nothing.
    following = [*parts[1:], ""]
    return [part for part, after in zip(parts, following, strict=True) if len(part) > 120 or len(after) > 120]


class _Blocks(HTMLParser):
    """The blocks of a page as text."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = [""]
        self._skipped = self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        beside = tag == "div" and (self._skipped or not BESIDE.isdisjoint(classes.split()))
        self._skipped += tag in SKIPPED or bool(beside)
        self._verbatim += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped and (tag in SKIPPED or tag == "div"):
            self._skipped -= 1
        self._verbatim -= tag == "pre"
        if tag in BLOCKS:
            self.parts.append("")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts[-1] += data if self._verbatim else re.sub(r"\s+", " ", data)


def _html_paragraphs(text: str) -> list[str]:
    """The blocks of a page that hold words, without marks that link to themselves."""
    parser = _Blocks()
    parser.feed(text)
    parts = [part.replace("¶", "").strip() for part in parser.parts]
    return [part for part in parts if len(part) > 1]
