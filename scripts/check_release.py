"""Whether a tag may be released: it is a version, and CHANGELOG.md says what is in it, with a date.

python scripts/check_release.py v0.1.0              # before anything is built
python scripts/check_release.py v0.1.0 dist         # and whether every file in dist/ is of that version

The version of what is built comes from the tag (setup.py).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAG = re.compile(r"v(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)")


def section(changelog: str, name: str) -> tuple[str, str] | None:
    """What stands behind a version in its heading, and its text; None when it has none."""
    found = re.search(rf"^## {re.escape(name)} \(([^)\n]*)\)$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return None if found is None else (found[1], found[2].strip())


def prepared(changelog: str) -> str:
    """The version that the changelog is written for: its first."""
    found = re.search(r"^## (\S+) \(", changelog, re.MULTILINE)
    assert found is not None, "CHANGELOG.md has a section"
    return found[1]


def faults(tag: str, changelog: str) -> list[str]:
    """Why a tag may not be released, each as a sentence."""
    named = TAG.fullmatch(tag)
    if named is None:
        return [f"the tag is {tag!r}: a release is tagged as v1.2.3, or as v1.2.3rc1"]
    name, found = named[1], section(changelog, named[1])
    if found is None:
        return [f"CHANGELOG.md has no section '## {name} (date)'; its first is {prepared(changelog)}"]
    (date, text), said = found, []
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        said.append(f"CHANGELOG.md dates {name} as {date!r}: write the day of the release, 2026-12-31")
    if "- " not in text:
        said.append(f"CHANGELOG.md says nothing of {name}")
    return said


def strangers(tag: str, folder: Path) -> list[str]:
    """Files that were not built of this tag, each as a sentence; that there are none is one, too."""
    files, name = sorted(folder.iterdir()), tag.removeprefix("v")
    others = [file.name for file in files if not file.name.startswith((f"outlierq-{name}-", f"outlierq-{name}.tar."))]
    return [f"{file} is not of {tag}" for file in others] if files else [f"{folder} is empty"]


def main() -> int:
    """Print what is wrong; 1 when something is."""
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    said = faults(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    said += strangers(sys.argv[1], Path(sys.argv[2])) if sys.argv[2:] else []
    for fault in said:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
