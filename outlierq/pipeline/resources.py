"""What a job may use: a device, processes, memory, and somebody who listens."""

from __future__ import annotations

from dataclasses import dataclass

from outlierq.pipeline.events import Listener, silent
from outlierq.pipeline.processes.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Resources:
    """What a job may use. Whether code of the checkpoint may run is a property of the checkpoint.

    device: "cpu" or "cuda". listen: is told of every step. ranks: the processes that share the work; all of them start
    the same job, and the lead writes. max_memory: bytes that each process, and its GPU, may hold (None: no ceiling);
    OutlierqError before any work when they are too few.
    """

    device: str = "cpu"
    listen: Listener = silent
    ranks: Ranks = ALONE
    max_memory: int | None = None


USUAL = Resources()
