"""Whether a tag may be released: it is the version of the package, and CHANGELOG.md says what is in it, with a date.

python scripts/check_release.py v0.1.0
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """The version of the package, without importing it."""
    tree = ast.parse((ROOT / "outlierq" / "__init__.py").read_text(encoding="utf-8"))
    values = (node for node in tree.body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in values if ast.unparse(node.targets[0]) == "__version__")


def section(changelog: str, name: str) -> tuple[str, str] | None:
    """What stands behind a version in its heading, and its text; None when it has none."""
    found = re.search(rf"^## {re.escape(name)} \(([^)\n]*)\)$\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    return None if found is None else (found[1], found[2].strip())


def faults(tag: str, changelog: str) -> list[str]:
    """Why a tag may not be released, each as a sentence."""
    name, said = version(), []
    if tag != f"v{name}":
        said.append(f"the tag is {tag}, and the package says {name}: change outlierq/__init__.py or the tag")
    found = section(changelog, name)
    if found is None:
        return [*said, f"CHANGELOG.md has no section '## {name} (date)'"]
    date, text = found
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        said.append(f"CHANGELOG.md dates {name} as {date!r}: write the day of the release, 2026-12-31")
    if "- " not in text:
        said.append(f"CHANGELOG.md says nothing of {name}")
    return said


def main() -> int:
    """Print what is wrong; 1 when something is."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    found = faults(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
