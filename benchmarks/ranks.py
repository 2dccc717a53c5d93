"""One process with two threads against two processes with one thread each: wall time, and whether the bytes are equal.

Both calibrate and quantize the same model with the same number of shards, in turns. The time of a whole command, the
start of Python and torchrun included, is compared: the median of the pairs' ratios must not pass the limit. Then 1, 2
and 4 processes with one thread each must write the same files, and it is noted whether two threads write them, too.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import measure
from record import write_results

LIMIT = 1.0
SHARDS = 4
REPORT = "outlierq.json"


def command(processes: int, arguments: argparse.Namespace, out: Path) -> list[str]:
    """The command line of a run."""
    words = ["-m", "outlierq", "quantize", str(arguments.model), "--recipe", arguments.recipe, "-q", "-o", str(out)]
    for setting in (f"samples={arguments.samples}", f"sequence_length={arguments.length}", f"shards={SHARDS}"):
        words += ["--set", f"calibration.{setting}"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(start if processes > 1 else []), *words]


def digest(out: Path) -> str:
    """sha256 of everything that was written but the report, which holds times."""
    whole = hashlib.sha256()
    for path in sorted(out.iterdir()):
        if path.name != REPORT:
            whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def run(processes: int, threads: int, arguments: argparse.Namespace, folder: Path) -> dict:
    """One run: its cost, its seconds by stage, and the digest of what it wrote."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    cost = measure(command(processes, arguments, out), folder / "log", {"OMP_NUM_THREADS": str(threads)})
    report = json.loads((out / REPORT).read_text())
    return {**cost, "stages": report["seconds"], "digest": digest(out)}


def main() -> None:
    """Time both by turns, then compare the bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder of SmolLM2-135M-Instruct in bf16"
    )
    parser.add_argument("--recipe", default="gptq-w4", help="a recipe that calibrates (default: gptq-w4)")
    parser.add_argument("--samples", type=int, default=32, help="token windows (default: 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs (default: 5)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {"one process, 2 threads": [], "2 processes, 1 thread": []}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for _ in range(arguments.repeats):
            runs["one process, 2 threads"].append(run(1, 2, arguments, folder))
            runs["2 processes, 1 thread"].append(run(2, 1, arguments, folder))
        digests = {f"{count} processes, 1 thread": run(count, 1, arguments, folder)["digest"] for count in (1, 2, 4)}
    one, two = runs.values()
    ratios = [b["wall_seconds"] / a["wall_seconds"] for a, b in zip(one, two, strict=True)]
    ratio = statistics.median(ratios)
    sections = {
        "recipe": arguments.recipe,
        "samples": arguments.samples,
        "sequence_length": arguments.length,
        "shards": SHARDS,
        "load": os.getloadavg()[0],
        "runs": runs,
        "ratios": ratios,
        "bound": {"ratio": ratio, "limit": LIMIT, "met": ratio <= LIMIT},
        "digests": digests,
        "equal_for_any_number_of_processes": len(set(digests.values())) == 1,
        "equal_for_two_threads": one[0]["digest"] in digests.values(),
    }
    write_results(arguments.output, sections)


if __name__ == "__main__":
    main()
