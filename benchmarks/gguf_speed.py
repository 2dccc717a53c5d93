"""How long a type of GGUF takes without data: our command beside llama-quantize, on the same random file.

Each run is a process of its own, ours and theirs in turn, so that what else a machine does meets both. What is
compared is what a weight costs, the difference between a file and one with twice the blocks; what a process costs
whatever the file, most of it imports of Python, is given beside it. Types for which llama.cpp looks for the best scales
are searched by us, too (`scale_search: mse`), the others rounded at once. CPU seconds are those of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from random_llama import write_random_llama
from record import write_results

LIMIT = 0.8
# Whether llama.cpp looks for scales without an importance matrix.
TYPES = {
    "Q4_0": False, "Q4_1": False, "Q5_0": False, "Q5_1": False, "Q8_0": False, "Q2_K": True, "Q3_K": True,
    "Q4_K": True, "Q5_K": True, "Q6_K": True, "IQ4_NL": True, "IQ4_XS": True, "IQ3_S": True,
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 288, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
RECIPE = """
description: one type, no data
quantize: {{method: rtn, type: {type}, embeddings: {type}, ignore: [], scale_search: {search}}}
export: {{format: gguf}}
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of one run."""

    cpu: float
    wall: float


def timed(words: list[str], threads: int) -> Cost:
    """The cost of a program; CalledProcessError when it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(words, capture_output=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, time.perf_counter() - began)


def source(folder: Path, blocks: int) -> tuple[Path, int]:
    """A file of a random Llama in bfloat16, and the number of its weights."""
    import gguf_models

    file, model = folder / f"{blocks}.gguf", folder / f"model-{blocks}"
    if not file.exists():
        write_random_llama(model, {**CONFIG, "num_hidden_layers": blocks})
        gguf_models.write_bytes_tokenizer(model)
        words = (sys.executable, "-m", "outlierq", "quantize", model, "-r", "dense", "--format", "gguf", "-o", file)
        timed([*map(str, words), "-q"], 1)
    return file, file.stat().st_size // 2


def ours(file: Path, kind: str, folder: Path, threads: int) -> Cost:
    """Our command, its report and its reading back of everything that it wrote included."""
    recipe, out = folder / "recipe.yaml", folder / "ours.gguf"
    recipe.write_text(RECIPE.format(type=kind, search="mse" if TYPES[kind] else "minmax"))
    for path in folder.glob("ours.gguf*"):
        path.unlink()
    words = (sys.executable, "-m", "outlierq", "quantize", file, "-r", recipe, "-o", out, "-q")
    return timed([*map(str, words)], threads)


def theirs(tool: Path, file: Path, kind: str, folder: Path, threads: int) -> Cost:
    """llama-quantize without an importance matrix, everything in one type."""
    return timed([*map(str, (tool, "--pure", file, folder / "theirs.gguf", kind, threads))], threads)


def compared(kind: str, files: list[tuple[Path, int]], tool: Path, folder: Path, threads: int, rounds: int) -> dict:
    """Both on both files, in turn."""
    runs: dict[str, list[list[Cost]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        runs["theirs"].append([theirs(tool, file, kind, folder, threads) for file, _ in files])
        runs["ours"].append([ours(file, kind, folder, threads) for file, _ in files])
    weights = files[1][1] - files[0][1]
    row: dict = {"type": kind, "threads": threads, "searched": TYPES[kind], "weights": [count for _, count in files]}
    for who, costs in runs.items():
        per_weight = median((large.cpu - small.cpu) / weights * 1e9 for small, large in costs)
        row[who] = {
            "cpu_ns_per_weight": per_weight,
            "cpu_seconds": median(large.cpu for _, large in costs),
            "wall_seconds": median(large.wall for _, large in costs),
        }
    row["speed"] = row["theirs"]["cpu_ns_per_weight"] / row["ours"]["cpu_ns_per_weight"]
    row["speed_of_whole_process"] = row["theirs"]["cpu_seconds"] / row["ours"]["cpu_seconds"]
    row["met"] = row["speed"] >= LIMIT
    print(f"{kind} {threads}: {row['speed']:.2f}, whole process {row['speed_of_whole_process']:.2f}", flush=True)
    return row


def main() -> None:
    """Make the files, run both tools, write the figures after each type; those of other types stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--blocks", type=int, default=6, help="of the smaller file, 45 million weights each")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the JSON file")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    files = [source(asked.work, count) for count in (asked.blocks, 2 * asked.blocks)]
    rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    for threads in asked.threads:
        for kind in asked.types:
            row = compared(kind, files, asked.llama_quantize, asked.work, threads, asked.rounds)
            rows = [each for each in rows if (each["type"], each["threads"]) != (kind, threads)] + [row]
            write_results(asked.out, {"limit": LIMIT, "rows": rows})


if __name__ == "__main__":
    main()
