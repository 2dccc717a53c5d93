"""What GPTQ and AWQ cost at the width of a large model: blocks of Llama-3-8B's shape, ours beside llm-compressor's.

Same random weights, same tokens, whole processes, ours and the peer's in turn. `plain` is GPTQ without scale search and
refinement, as the peer's is. The results are written after every run, and runs that they hold are not repeated.
Solving is also given as a share of the machine's float32 products: operations that docs/scaling.md counts over seconds,
over the rate of one large product in the same number of threads, taken right after the run.
"""

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from block_cost import config_of, operations
from measure import measure
from protocol import CALIBRATION_TEXT, SEQUENCE_LENGTH, text_windows
from random_llama import write_random_llama
from record import versions, write_results
from runs import GROUP_SIZE, OURS, PEER_SCRIPTS

PEAK_LIMIT, SOLVING_LIMIT = 0.5, 0.35
PLAIN = {"quantize.refine_passes": 0, "quantize.scale_search": "minmax"}
# Ours: recipe, settings, the peer's run beside it, and at most what share of its CPU seconds.
VARIANTS = {
    "gptq": ("gptq-w4", {}, "llmcompressor-gptq", 0.35),
    "plain": ("gptq-w4", PLAIN, "llmcompressor-gptq", 0.2),
    "awq": ("awq-w4", {}, "llmcompressor-awq", 0.2),
}
# Products of a weight with half of a matrix (`operations`); the power of the output is that of every eighth row.
PRODUCTS = {"gptq": 3.125, "plain": 1.125}
RUNS = ("gptq", "llmcompressor-gptq", "plain", "awq", "llmcompressor-awq")


def ours(program: str, recipe: str, source: Path, out: Path, text: Path, samples: int, settings: dict) -> list[str]:
    """Our command line: as many windows of the text, the first ones, as the peer gets."""
    settings = {
        "quantize.group_size": GROUP_SIZE,
        "calibration.text": text,
        "calibration.samples": samples,
        "calibration.sequence_length": SEQUENCE_LENGTH,
        "calibration.seed": "null",
        **settings,
    }
    asked = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [program, "quantize", str(source), "--recipe", recipe, *asked, "-o", str(out)]


def product_rate(threads: int) -> float:
    """Operations per second of one large product of float32 matrices."""
    torch.set_num_threads(threads)
    size, best = 4096, float("inf")
    left, right = torch.randn(2, size, size)
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def solving(out: Path, width: int, blocks: int, threads: int, products: float) -> dict[str, float]:
    """Seconds of solving from the report of a run, and its counted operations as a share of float32 products.

    products: see `operations`.
    """
    seconds = json.loads((out / "outlierq.json").read_text())["seconds"]["quantize"]
    counted = blocks * operations(width, 0, products)["quantize"]
    return {"seconds": seconds, "share_of_float32_products": counted / seconds / product_rate(threads)}


def compared(found: dict[str, dict]) -> list[dict]:
    """Our runs over the peer's, for each figure that has a limit."""
    rows = []
    for name, (_, _, rival, limit) in VARIANTS.items():
        if rival in found and name in found:
            for figure, most in (("cpu_seconds", limit), ("peak_bytes", PEAK_LIMIT)):
                ratio = found[name][figure] / found[rival][figure]
                rows.append({"run": name, "figure": figure, "ratio": ratio, "limit": most, "met": ratio <= most})
    return rows


def one_run(name: str, folder: Path, text: Path, asked: argparse.Namespace) -> dict:
    """What one run costs. folder: with the model in `source` and the windows in `tokens.json`."""
    environment = {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    source, out, log = folder / "source", folder / name, folder / f"{name}.log"
    if name in VARIANTS:
        recipe, settings, _, _ = VARIANTS[name]
        line = ours(asked.outlierq, recipe, source, out, text, asked.samples, settings)
        cost = measure(line, log, environment)
        if name in PRODUCTS:
            cost["solving"] = solving(out, asked.width, asked.blocks, asked.threads, PRODUCTS[name])
        return cost
    peer, method = asked.llmcompressor_python, name.removeprefix("llmcompressor-")
    script = str(PEER_SCRIPTS / "llmcompressor_run.py")
    line = [peer, script, str(source), str(folder / "tokens.json"), str(out), "--method", method]
    return {**measure(line, log, environment), "versions": versions(peer)}


def main() -> None:
    """Write the model, then do every run that is not there yet; the peer's if its Python is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the WikiText-2 raw texts")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--outlierq", default=OURS, help="our command")
    parser.add_argument("--llmcompressor-python", help="Python of the environment with llm-compressor")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="do only these runs")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    vocabulary = json.loads((asked.tokenizer / "config.json").read_text())["vocab_size"]
    found = json.loads(asked.output.read_text())["runs"] if asked.output.exists() else {}
    with TemporaryDirectory(dir=asked.output.parent) as name:
        folder = Path(name)
        source = folder / "source"
        write_random_llama(source, config_of(asked.width, asked.blocks, vocabulary), asked.tokenizer)
        text = asked.data_dir.resolve() / CALIBRATION_TEXT
        (folder / "tokens.json").write_text(json.dumps(text_windows(source, text, asked.samples).tolist()))
        for run in asked.only:
            if run in found or (run not in VARIANTS and not asked.llmcompressor_python):
                continue
            found[run] = one_run(run, folder, text, asked)
            print(run, json.dumps(found[run]), flush=True)
            sections = {
                "width": asked.width,
                "blocks": asked.blocks,
                "tokens": asked.samples * SEQUENCE_LENGTH,
                "threads": asked.threads,
                "load": os.getloadavg()[0],
                "bounds": compared(found),
                "solving_limit": SOLVING_LIMIT,
                "runs": found,
            }
            write_results(asked.output, sections)


if __name__ == "__main__":
    main()
