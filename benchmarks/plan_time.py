"""The time that `outlierq plan` names beside the time that the run takes, on a machine that is half busy.

    python benchmarks/plan_time.py --model smollm2 -o benchmarks/results/plan_time.json

One process for every two processors does nothing but compute, from two minutes before the first plan to the end, so
that the load of the system is that of the whole time. Each recipe is planned and then run as a command of its own; the
bound is a factor of two, for runs above a minute. Leave the machine alone beside this: a load that changes after the
plan makes the figure worthless. Some 25 minutes on two processors.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import measure
from record import write_results

RECIPES = ("gptq-w4", "awq-gptq-w4", "smoothquant-w8a8", "rotate-w4a4", "gguf-q4_k_m")
BOUND, SHORTEST = 2.0, 60  # seconds


def spin() -> None:
    """Compute until the parent ends."""
    parent = os.getppid()
    while os.getppid() == parent:
        sum(range(100_000))


@contextmanager
def half_busy(processes: int, settle: float) -> Iterator[None]:
    """Processes that compute while the context lasts, and before it until the load of the last minute shows them."""
    spinning = [multiprocessing.Process(target=spin, daemon=True) for _ in range(processes)]
    for each in spinning:
        each.start()
    time.sleep(settle)
    try:
        yield
    finally:
        for each in spinning:
            each.terminate()


def planned(words: list[str]) -> dict:
    """What the plan says, with its notes for people."""
    done = subprocess.run(
        [sys.executable, "-m", "outlierq", "plan", *words, "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def row(recipe: str, asked: argparse.Namespace, folder: Path) -> dict:
    """A recipe, planned and run. ratio: the larger of both times over the smaller."""
    words = [asked.model, "-r", recipe]
    if asked.samples:
        words += ["-s", f"calibration.samples={asked.samples}"]
    said = planned(words)
    command = [sys.executable, "-m", "outlierq", "quantize", *words, "-o", str(folder / recipe), "--quiet"]
    cost = measure(command, folder / f"{recipe}.log")
    expected, took = said["estimated_seconds"], cost["wall_seconds"]
    figures = {"estimated_seconds": round(expected, 1), "alone": round(said["estimated_seconds_alone"], 1)}
    ratio = max(expected / took, took / expected)
    kept = ratio <= BOUND if took >= SHORTEST else None
    return {"recipe": recipe, **figures, **cost, "ratio": round(ratio, 2), "within_bound": kept}


def main() -> int:
    """Writes the JSON, prints a line for each recipe; 1 when a run above a minute is off by more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of the Hugging Face kind, or a GGUF file")
    parser.add_argument("--name", help="of the model, in the results; the last part of its path without it")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--samples", type=int, help="token windows; the recipes' own without it")
    usual = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--busy", type=int, default=usual, help=f"processes that compute beside it (here: {usual})")
    parser.add_argument("--settle", type=float, default=120, help="seconds before the first plan (default: 120)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    asked = parser.parse_args()
    rows = []
    with half_busy(asked.busy, asked.settle), TemporaryDirectory() as place:
        for recipe in asked.recipes:
            rows.append(row(recipe, asked, Path(place)))
            print(
                "{recipe:<20} {estimated_seconds:8.1f} s planned {wall_seconds:8.1f} s taken {ratio:6.2f}".format(
                    **rows[-1]
                ),
                flush=True,
            )
    conditions = {"model": asked.name or Path(asked.model).name, "samples": asked.samples}
    write_results(asked.output, conditions | {"busy_processes": asked.busy, "bound": BOUND, "rows": rows})
    return int(any(each["within_bound"] is False for each in rows))


if __name__ == "__main__":
    sys.exit(main())
