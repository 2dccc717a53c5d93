"""What GPTQ costs at the width of a large model: two blocks of Llama-3-8B's shape, ours beside llm-compressor's.

Same random weights, same tokens, whole processes. `plain` is GPTQ without scale search and refinement, as the peer's
is. Solving is also given as a share of the machine's float32 products: operations that docs/scaling.md counts over
seconds, over the rate of one large product in the same number of threads, taken right after the run.
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

BLOCKS = 2
CPU_LIMIT, PLAIN_LIMIT, PEAK_LIMIT, SOLVING_LIMIT = 0.35, 0.2, 0.5, 0.35
VARIANTS = {"gptq": {}, "plain": {"quantize.refine_passes": 0, "quantize.scale_search": "minmax"}}


def ours(program: str, source: Path, out: Path, text: Path, samples: int, settings: dict) -> list[str]:
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
    return [program, "quantize", str(source), "--recipe", "gptq-w4", *asked, "-o", str(out)]


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


def solving(out: Path, width: int, threads: int, products: int) -> dict[str, float]:
    """Seconds of solving from the report of a run, and its counted operations as a share of float32 products.

    products: see `operations`.
    """
    seconds = json.loads((out / "outlierq.json").read_text())["seconds"]["quantize"]
    counted = BLOCKS * operations(width, 0, products)["quantize"]
    return {"seconds": seconds, "share_of_float32_products": counted / seconds / product_rate(threads)}


def compared(found: dict[str, dict]) -> list[dict]:
    """Our runs over the peer's, for each figure that has a limit."""
    peer = found.get("llmcompressor")
    rows = []
    for name, limit in (("gptq", CPU_LIMIT), ("plain", PLAIN_LIMIT)):
        if peer and name in found:
            for figure, most in (("cpu_seconds", limit), ("peak_bytes", PEAK_LIMIT)):
                ratio = found[name][figure] / peer[figure]
                rows.append({"run": name, "figure": figure, "ratio": ratio, "limit": most, "met": ratio <= most})
    return rows


def main() -> None:
    """Write the model, run every variant, then the peer if its Python is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the WikiText-2 raw texts")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--outlierq", default=OURS, help="our command")
    parser.add_argument("--llmcompressor-python", help="Python of the environment with llm-compressor")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens (default: 16)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, "llmcompressor"], help="do only these runs")
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args()
    environment = {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
    vocabulary = json.loads((asked.tokenizer / "config.json").read_text())["vocab_size"]
    found = {}
    with TemporaryDirectory(dir=asked.output.parent) as name:
        folder = Path(name)
        source, tokens = folder / "source", folder / "tokens.json"
        write_random_llama(source, config_of(asked.width, BLOCKS, vocabulary), asked.tokenizer)
        text = asked.data_dir.resolve() / CALIBRATION_TEXT
        tokens.write_text(json.dumps(text_windows(source, text, asked.samples).tolist()))
        for variant, settings in VARIANTS.items():
            if asked.only is None or variant in asked.only:
                out = folder / variant
                line = ours(asked.outlierq, source, out, text, asked.samples, settings)
                found[variant] = measure(line, folder / f"{variant}.log", environment)
                found[variant]["solving"] = solving(out, asked.width, asked.threads, 2 if settings else 4)
                print(variant, json.dumps(found[variant]), flush=True)
        peer = asked.llmcompressor_python
        if peer and (asked.only is None or "llmcompressor" in asked.only):
            script = str(PEER_SCRIPTS / "llmcompressor_run.py")
            line = [peer, script, str(source), str(tokens), str(folder / "peer"), "--method", "gptq"]
            found["llmcompressor"] = {**measure(line, folder / "peer.log", environment), "versions": versions(peer)}
            print("llmcompressor", json.dumps(found["llmcompressor"]), flush=True)
    sections = {
        "width": asked.width,
        "blocks": BLOCKS,
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
