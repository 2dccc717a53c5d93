"""Where a job stands, from the events that it tells: units done, time gone and left, the step and for how long."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_high

from outlierq.pipeline.asked.events import Event

BEGINNING = Event("preparing", 0, 0)
INSIDE = {"quantize": "calibrate"}  # what a stage does for each block before its own part
# Units whose time says how long the next ones take. Their median: a first one also reads the text, and units that an
# earlier run has made pass in no time.
RECENT = 4


@dataclass(frozen=True)
class Standing:
    """stage, done, total: as in `Event`. place: units done, with the part of the one at hand. step: what is done
    for it.

    gone: seconds since the stage began. left: estimated from units that are done; None before there is one, and at the
    end. in_step: seconds since the step began, or moved. error: relative output error so far.
    """

    stage: str
    done: int
    total: int
    place: float
    gone: float
    left: float | None
    step: str
    share: float
    in_step: float
    subject: str
    error: float | None


class Course:
    """Hears every event and tells where the job stands. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._begin(BEGINNING, clock())

    def _begin(self, event: Event, now: float) -> None:
        """Another stage, or the same one again."""
        self._event, self._stage = event, event.stage
        self._began = self._moved = self._unit_since = now
        self._place = float(event.done)
        self._took: deque[float] = deque(maxlen=RECENT)  # seconds of a unit

    def listen(self, event: Event) -> None:
        """Take in what has happened."""
        now = self._clock()
        inside = INSIDE.get(self._stage) == event.stage and event.total == self._event.total
        if event.done < self._event.done or not (inside or event.stage == self._stage):
            self._begin(event, now)
        if event.done > self._event.done:
            ahead = event.done - self._event.done
            self._took.extend([(now - self._unit_since) / ahead] * min(ahead, RECENT))
            self._unit_since = now
        if (event.step, event.share, event.done) != (self._event.step, self._event.share, self._event.done):
            self._moved = now
        self._place = max(self._place, event.done + self._part(event, inside))
        self._event = event

    def _part(self, event: Event, inside: bool) -> float:
        """How much of the unit at hand is done: a stage with another one inside has half of it for itself."""
        if inside:
            return event.share / 2
        halves = self._stage in INSIDE and event.step != ""
        return (1 + event.share) / 2 if halves else event.share

    def standing(self) -> Standing:
        """As it is now."""
        now, event = self._clock(), self._event
        return Standing(
            self._stage,
            event.done,
            event.total,
            min(self._place, event.total),
            now - self._began,
            self._left(now),
            event.step,
            event.share,
            now - self._moved,
            event.subject,
            event.error,
        )

    def _left(self, now: float) -> float | None:
        """Seconds until the last unit is done, None while nothing is known of a unit's time, and when it is done."""
        waiting = self._event.total - self._event.done
        if not self._took or not waiting:
            return None
        each = median_high(self._took)
        return max(0.0, each * waiting - min(each, now - self._unit_since))
