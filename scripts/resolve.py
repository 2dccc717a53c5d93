"""Asks uv's resolver whether outlierq can be installed beside other programs; downloads metadata, installs nothing.

    python scripts/resolve.py [--write docs/resolved.json]

Prints for each program, and for Python 3.11 to 3.13, the versions that fit both, or why there are none (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
BESIDE = ("vllm==0.33.0", "llmcompressor==0.14.0.1")
SHOWN = ("transformers", "compressed-tensors", "huggingface-hub", "torch", "accelerate", "lm-eval", "datasets", "gguf")


def resolved(beside: str, python: str) -> dict[str, str] | str:
    """Versions by name that satisfy outlierq with all extras and `beside`; what the resolver says where none do."""
    words = ("pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", python)
    command = [sys.executable, "-m", "uv", *words, "--extra", "all", "pyproject.toml", "-"]
    done = subprocess.run(command, cwd=ROOT, input=beside, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


def main() -> int:
    """The answers as a table, and as JSON where asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="keep the answers as JSON here")
    arguments = parser.parse_args()
    answers, failed = {}, False
    for beside in BESIDE:
        for python in PYTHONS:
            versions = resolved(beside, python)
            if isinstance(versions, str):
                failed = True
                print(f"{beside}, Python {python}: no versions fit\n{versions}")
                continue
            shown = {name: versions[name] for name in SHOWN if name in versions}
            answers.setdefault(beside, {})[python] = shown
            print(f"{beside}, Python {python}: {', '.join(map(' '.join, shown.items()))}")
    if arguments.write:
        arguments.write.write_text(json.dumps(answers, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
