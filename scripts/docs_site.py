"""The pages of docs/ as the site's sources: what they link to outside of docs/ comes along, below repository/.

    python scripts/docs_site.py            # writes build/docs; `make docs` then builds the site of it

A page says `../benchmarks/results/fit.json`, which is right where the repository is read. On the site the same link
leads to a copy, so that it works at any address, and without one. Code becomes a page, a folder a list of its files.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".c": "c", ".cu": "cpp", ".sh": "bash", ".txt": "text"}
LINK = re.compile(r"(?P<before>\[[^\]\[]*\]\()(?P<target>[^)\s#]+)(?P<after>(?:#[^)\s]*)?\))")
FENCED = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Writes the sources anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "build" / "docs")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    write_sources(out)


def write_sources(out: Path) -> None:
    """Every file of docs/, with its links as they lead on the site, and everything that they lead to."""
    places = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file())
    for place in places:  # grows while it runs
        target = out / uri_of(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = page_of(place)
        if text is None:
            shutil.copyfile(ROOT / place, target)
            continue
        target.write_text(with_links(text, place))
        places += [each for each in dict.fromkeys(linked(text, place)) if each not in places]


def with_links(text: str, place: str) -> str:
    """The page at `place` in the repository with its links as they lead on the site."""
    folder = posixpath.dirname(uri_of(place))

    def on_site(link: re.Match[str]) -> str:
        target = resolved(link["target"], place)
        leads = link["target"] if target is None else posixpath.relpath(uri_of(target), folder)
        return f"{link['before']}{leads}{link['after']}"

    return LINK.sub(on_site, text)


def linked(text: str, place: str) -> Iterator[str]:
    """The files and folders of the repository that a page links to."""
    targets = (resolved(link["target"], place) for link in LINK.finditer(FENCED.sub("", text)))
    return (target for target in targets if target is not None)


def resolved(target: str, place: str) -> str | None:
    """The path in the repository that a link on the page at `place` leads to; None where there is nothing."""
    folder = place if (ROOT / place).is_dir() else posixpath.dirname(place)
    path = posixpath.normpath(posixpath.join(folder, target))
    if path.startswith(("..", "/")) or not (ROOT / path).exists():
        return None
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def uri_of(place: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    path = ROOT / place
    more = "/index.md" if path.is_dir() else ".md" if path.suffix in LANGUAGES else ""
    return f"{PLACE}/{place}{more}"


def page_of(place: str) -> str | None:
    """Markdown for a file or folder of the repository; None for what is copied as it is."""
    path = ROOT / place
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        return f"# {place}\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
    if path.suffix == ".md":
        return path.read_text()
    if path.suffix in LANGUAGES and not place.startswith("docs/"):
        return f"# {place}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text().rstrip()}\n```\n"
    return None


if __name__ == "__main__":
    main()
