"""Seconds of calls that are compared: the least of several rounds in which all take turns, so that a busy machine or a
changing clock hits all of them; what is far behind is not waited for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

HOPELESS = 4.0  # times the least, twice: such a call is not made again
PATIENCE = 0.1  # seconds: a first call that takes less says nothing, since it prepares things
NEVER = float("inf")
Name = TypeVar("Name")
Clock = Callable[[], float]


def clock_here() -> Clock:
    """CPU seconds of one thread, which leave out what other processes take; else seconds."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def least_seconds(
    calls: Mapping[Name, Callable[[], Any]], rounds: int, clock: Clock, wait: Callable[[], Any] = lambda: None
) -> dict[Name, float]:
    """Seconds by name, of `rounds` and of one before, which counts only for what takes too long to be tried again.

    wait: until a device has done what was asked of it.
    """
    first = {name: _timed(call, clock, wait) for name, call in calls.items()}
    limit = max(PATIENCE, HOPELESS * min(first.values()))
    best = {name: seconds for name, seconds in first.items() if seconds > limit}
    going = {name: call for name, call in calls.items() if name not in best}
    for number in range(rounds):
        best |= {name: min(best.get(name, NEVER), _timed(call, clock, wait)) for name, call in going.items()}
        limit = HOPELESS * min(best.values())
        going = {name: call for name, call in going.items() if best[name] <= limit or number == 0}
    return best


def _timed(call: Callable[[], Any], clock: Clock, wait: Callable[[], Any]) -> float:
    with torch.inference_mode():
        wait()
        start = clock()
        call()
        wait()
        return clock() - start
