"""How fast this machine multiplies, and how much of that is left while others work on it."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass

from outlierq.core.machine.cache_folder import cache_folder
from outlierq.core.machine.own_files import write_atomically

SAMPLES, SAMPLE_SECONDS = 8, 0.01
SIDE = 512  # of the matrices


@dataclass(frozen=True)
class Speed:
    """Operations per second of a bfloat16 matrix product. best: the most that was ever seen on this machine.

    now: the mean of a few samples. waiting: how many times longer work takes beside the processes that run: as the
    system's load of the last minute says, or these samples.
    """

    best: float
    now: float
    load: float

    @property
    def waiting(self) -> float:
        """At least 1."""
        return max(1.0, self.load, self.best / self.now)


def measured_speed() -> Speed:
    """Of this machine with torch's number of threads, from a tenth of a second; the best is kept in the cache."""
    import torch

    matrix = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    matrix @ matrix
    samples = [_sample(matrix) for _ in range(SAMPLES)]
    threads = torch.get_num_threads()
    best = _kept(max(samples), f"{platform.node()} {platform.processor()} {torch.__version__} {threads}")
    return Speed(best, sum(samples) / SAMPLES, _load(threads))


def _sample(matrix: object) -> float:
    """Operations per second over some milliseconds."""
    started, count = time.perf_counter(), 0
    while (gone := time.perf_counter() - started) < SAMPLE_SECONDS or not count:
        matrix @ matrix  # type: ignore[operator]
        count += 1
    return count * 2 * SIDE**3 / gone


def _load(threads: int) -> float:
    """How many share a processor when this many threads come to those that ran in the last minute."""
    try:
        return (os.getloadavg()[0] + threads) / (os.cpu_count() or 1)
    except OSError:
        return 1.0


def _kept(found: float, machine: str) -> float:
    """The better of this figure and the one that is kept, which is replaced by a better one where it can be."""
    place = cache_folder() / "speed.json"
    try:
        known = {str(name): float(value) for name, value in json.loads(place.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        known = {}
    best = max(found, known.get(machine, 0.0))
    if best > known.get(machine, 0.0):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(known | {machine: best}).encode())
        except OSError:
            pass  # measured again next time
    return best
