"""Whether an installed wheel is whole: the compiled part loads, recipes and data are there, and the command answers."""

from __future__ import annotations

import subprocess
import sys

import outlierq
from outlierq.ops.compiled.rounding import library


def main() -> int:
    """Print what is there; an error stops it."""
    if library() is None:
        print("error: this wheel has no compiled part, or it does not load", file=sys.stderr)
        return 1
    said = subprocess.run([sys.executable, "-m", "outlierq", "--version"], capture_output=True, text=True, check=True)
    recipes = outlierq.recipes()
    assert "gptq-w4" in recipes and outlierq.__version__ in said.stdout
    print(f"{said.stdout.strip()}, compiled part, {len(recipes)} recipes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
