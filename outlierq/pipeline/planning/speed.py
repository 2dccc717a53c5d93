"""How fast this machine multiplies, and how much of that is left while others work on it."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.machine.cache_folder import cache_folder
from outlierq.core.machine.own_files import write_atomically

if TYPE_CHECKING:
    import torch

SAMPLES, SAMPLE_SECONDS = 8, 0.02
SIDE = 512  # of the matrices


@dataclass(frozen=True)
class Speed:
    """Operations per second of a bfloat16 matrix product. best: on processors of its own, the most that was ever seen.

    now: the mean of a few samples, by the clock on the wall. load: how many share a processor, by the system's load of
    the last minute.
    """

    best: float
    now: float
    load: float

    @property
    def waiting(self) -> float:
        """How many times longer work takes beside the processes that run, at least 1.

        Between what the load says and what the samples met: the one also counts who waits for a disk or has a low
        priority, the other has seen a moment only.
        """
        return math.sqrt(max(1.0, self.load) * max(1.0, self.best / self.now))


def measured_speed() -> Speed:
    """Of this machine with torch's number of threads, from some tenths of a second; the best is kept in the cache."""
    import torch

    matrix = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    matrix @ matrix
    threads = torch.get_num_threads()
    alone, wall = zip(*(_sample(matrix, threads) for _ in range(SAMPLES)), strict=True)
    best = _kept(max(alone), f"{platform.node()} {platform.processor()} {torch.__version__} {threads}")
    return Speed(best, sum(wall) / SAMPLES, _load(threads))


def _sample(matrix: torch.Tensor, threads: int) -> tuple[float, float]:
    """Operations in a second, if no thread had to wait, and by the clock. matrix: [side, side]."""
    started, computing, count = time.perf_counter(), time.process_time(), 0
    while (gone := time.perf_counter() - started) < SAMPLE_SECONDS or not count:
        matrix @ matrix
        count += 1
    done, busy = count * 2 * SIDE**3, time.process_time() - computing
    return done * threads / max(busy, 1e-6), done / gone


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
