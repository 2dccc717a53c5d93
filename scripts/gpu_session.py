"""What is measured the moment a GPU is lent, in at most 12 minutes: tests, kernels, then models of two shapes.

    python scripts/gpu_session.py              # results go to benchmarks/results/gpu_session.json
    python scripts/gpu_session.py --dry-run    # the steps and their limits, anywhere

Every step has a limit and is killed when it passes it; the results are written after each, so that what was measured
before is kept whatever happens. A step that fails does not stop the next. Models are random, with a tokenizer of bytes:
nothing is downloaded. Exit code 0 when all steps were done, 1 when one failed or was cut off, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

SESSION_SECONDS, DEVICE = 720, "cuda"
SAMPLES, WINDOW = 16, 512
VOCABULARY = 4096
LAST_LINES = 15
SHAPES = {  # hidden, intermediate, query heads, key heads
    "8B": (4096, 14336, 32, 8),
    "70B": (8192, 28672, 64, 8),
}


@dataclass(frozen=True)
class Step:
    """One measurement. limit: seconds. run: gives what goes into the results; its argument is seconds that are left."""

    name: str
    what: str
    limit: int
    run: Callable[[float], dict[str, Any]]


def steps(work: Path) -> list[Step]:
    """In this order: what is most worth knowing, should time run out, comes first."""
    kernels = [sys.executable, str(BENCHMARKS / "gpu_kernels.py")]
    output = BENCHMARKS / "results" / "gpu_kernels.json"
    return [
        Step("test-gpu", "kernels against float64, sanitizer, graphs", 180, lambda left: command(tests(), left)),
        Step("bench-gpu", "kernels against their bounds", 150, lambda left: command(kernels, left, output)),
        Step("8B", "gptq-w4 on two blocks of 8B shape", 120, lambda left: ours(work, "8B", 2, left)),
        Step("8B llm-compressor", "its GPTQ on the same", 120, lambda left: theirs(work, "8B", 2, left)),
        Step("70B", "gptq-w4 on as many blocks of 70B shape as fit", 150, lambda left: growing(work, "70B", left)),
    ]


def tests() -> list[str]:
    """`make test-gpu`, without installing."""
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "test_kernels_gpu.py")]


def command(words: list[str], seconds: float, output: Path | None = None) -> dict[str, Any]:
    """Run a command of ours for so many seconds at most. output: a file of results that it writes."""
    started = time.time()
    found = limited(words, seconds)
    if output is not None and output.is_file() and output.stat().st_mtime >= started:
        found["results"] = output.name
    return found


def limited(words: list[str], seconds: float) -> dict[str, Any]:
    """How a command ended: exit code (None: cut off), seconds, the most GPU memory in use meanwhile, its last lines."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log, GpuMemory() as memory:
        child = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
        log.seek(0)
        lines = log.read().splitlines()[-LAST_LINES:]
    taken = round(time.monotonic() - started, 2)
    return {"exit_code": code, "seconds": taken, "gpu_bytes": memory.most, "last_lines": lines}


class GpuMemory:
    """The most memory of the GPU in use inside the block, asked for twice a second."""

    def __init__(self) -> None:
        self.most, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import torch

        while torch.cuda.is_available() and not self._stop.wait(0.5):
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, total - free)


def ours(work: Path, shape: str, blocks: int, seconds: float) -> dict[str, Any]:
    """gptq-w4 on a random model: seconds by stage, and memory."""
    source = model(work, shape, blocks)
    out = work / f"{source.name}-w4"
    words = [sys.executable, "-m", "outlierq", "quantize", str(source), "-r", "gptq-w4", "-o", str(out), "-q"]
    settings = [f"calibration.samples={SAMPLES}", f"calibration.sequence_length={WINDOW}"]
    found = limited([*words, "--device", DEVICE, *(w for s in settings for w in ("--set", s))], seconds)
    report = out / "outlierq.json"
    if report.is_file():
        values = json.loads(report.read_text())
        found |= {"stages": values["seconds"], "peak_bytes": values["peak_bytes"]}
    return {"blocks": blocks, "tokens": SAMPLES * WINDOW, **found}


def theirs(work: Path, shape: str, blocks: int, seconds: float) -> dict[str, Any]:
    """llm-compressor's GPTQ on the same model, where it is installed."""
    from importlib.util import find_spec

    if find_spec("llmcompressor") is None:
        return {"exit_code": None, "left_out": "llm-compressor is not installed here"}
    source, tokens = model(work, shape, blocks), work / "tokens.json"
    windows = [[(i * 7919 + j * 104729) % 256 for j in range(WINDOW)] for i in range(SAMPLES)]
    tokens.write_text(json.dumps(windows))
    script = str(BENCHMARKS / "peers" / "llmcompressor_run.py")
    words = [sys.executable, script, str(source), str(tokens), str(work / "peer"), "--method", "gptq"]
    return {"blocks": blocks, "tokens": SAMPLES * WINDOW, **limited(words, seconds)}


def growing(work: Path, shape: str, seconds: float) -> dict[str, Any]:
    """The same with one block, then twice as many while the time allows."""
    runs: list[dict[str, Any]] = []
    end, blocks = time.monotonic() + seconds, 1
    while not runs or (runs[-1]["exit_code"] == 0 and time.monotonic() + 2.5 * runs[-1]["seconds"] < end):
        runs.append(ours(work, shape, blocks, end - time.monotonic()))
        blocks *= 2
    whole = [run for run in runs if run["exit_code"] == 0]
    return {"exit_code": 0 if whole else runs[-1]["exit_code"], "runs": runs}


def model(work: Path, shape: str, blocks: int) -> Path:
    """A random Llama of a shape, written once, with a token for every byte."""
    from random_llama import write_random_llama
    from throughput import CONFIG

    folder = work / f"{shape}-{blocks}"
    if not folder.exists():
        hidden, intermediate, heads, keys = SHAPES[shape]
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks}
        attention = {"num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": 2048}
        write_random_llama(folder, {**CONFIG, **sizes, **attention, "vocab_size": VOCABULARY})
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Bytes as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def session(chosen: list[Step], output: Path, seconds: float, device: dict[str, Any]) -> bool:
    """All steps, the results written after each; whether all were done."""
    from record import write_results

    end, results = time.monotonic() + seconds, {}
    for step in chosen:
        left = min(step.limit, end - time.monotonic())
        print(f"{step.name}: {step.what}, at most {max(left, 0):.0f} s", flush=True)
        try:
            found = step.run(left) if left > 1 else {"exit_code": None, "left_out": "no time is left"}
        except (OSError, RuntimeError, ValueError, LookupError, ImportError) as error:  # the next step may do better
            found = {"exit_code": 1, "error": f"{type(error).__name__}: {error}"}
        results[step.name] = found
        write_results(output, {"device": device, "limit_seconds": seconds, "steps": results})
        print(f"{step.name}: {'done' if found['exit_code'] == 0 else 'not done'}", flush=True)
    return all(found["exit_code"] == 0 for found in results.values())


def device_here() -> dict[str, Any] | None:
    """The GPU, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "bytes": properties.total_memory, "cuda": torch.version.cuda}


def main() -> int:
    """Print the steps, or do them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their limits")
    parser.add_argument("--seconds", type=float, default=SESSION_SECONDS, help="of the whole session (default: 720)")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--output", type=Path, default=BENCHMARKS / "results" / "gpu_session.json")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        chosen = [step for step in steps(Path(folder)) if step.name in (arguments.only or [step.name])]
        if arguments.dry_run:
            for step in chosen:
                print(f"{step.limit:4d} s  {step.name}: {step.what}")
            return 0
        device = device_here()
        if device is None:
            print("nothing measured: there is no GPU that torch can use here", file=sys.stderr)
            return 2
        return 0 if session(chosen, arguments.output, arguments.seconds, device) else 1


if __name__ == "__main__":
    sys.exit(main())
