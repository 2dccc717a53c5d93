"""What a job may use: a device, processes, memory, and somebody who listens."""

from __future__ import annotations

from dataclasses import dataclass

from outlierq.core.errors import ArgumentError, OutlierqError
from outlierq.core.machine.heap import return_memory_at_once
from outlierq.pipeline.asked.events import Listener, silent
from outlierq.pipeline.processes.ranks import ALONE, Ranks, present
from outlierq.recipe import parse_size

DEVICES = ("auto", "cpu", "cuda")


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

    @classmethod
    def of(cls, device: str = "auto", max_memory: str | int | None = None, listen: Listener = silent) -> Resources:
        """As a user says it: "auto" takes a GPU when there is one, a size may be "4GiB".

        ArgumentError for what is no device or size, OutlierqError when cuda is asked for and there is none. The
        processes are those that were started together.
        """
        return cls(usable_device(device), listen, present(), ceiling(max_memory))


USUAL = Resources()


def usable_device(asked: str) -> str:
    """ "cpu" or "cuda"; OutlierqError when cuda is asked for and there is none."""
    known_device(asked)
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise OutlierqError("--device cuda: torch finds no CUDA device", hint="use --device cpu")
    return "cpu"


def known_device(asked: str) -> str:
    """The word for a device; ArgumentError for any other."""
    if asked not in DEVICES:
        raise ArgumentError(f"{asked!r} is not a device; choose auto, cpu or cuda", argument="device")
    return asked


def ceiling(max_memory: str | int | None) -> int | None:
    """The bytes of a size like "4GiB". From here on the process gives freed memory back at once."""
    if max_memory is None:
        return None
    return_memory_at_once()  # before the model is built: its empty parts are allocated for a moment
    try:
        return parse_size(str(max_memory))
    except ValueError as error:
        raise ArgumentError(str(error), argument="max_memory") from None
