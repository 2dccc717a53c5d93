"""Wall seconds by stage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping


class Clock:
    """Adds up wall seconds by stage: `with clock("export"): ...`."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stage = ""
        self._since: float | None = None
        self._told: Counter[str] = Counter()

    def __call__(self, stage: str) -> Clock:
        self._stage = stage
        return self

    def share(self, seconds: float, work: Mapping[str, float]) -> None:
        """Add wall seconds in which several stages ran at once, in proportion to the work of each."""
        total = sum(work.values()) or 1.0
        self.seconds.update({stage: seconds * part / total for stage, part in work.items()})

    def spent(self) -> dict[str, float]:
        """Seconds since this was asked last, those of a stage that is not at its end included."""
        now = Counter(self.seconds)
        if self._since is not None:
            now.update({self._stage: time.perf_counter() - self._since})
        told, self._told = self._told, now
        return {stage: now[stage] - told[stage] for stage in now}

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._since is not None:
            self.seconds.update({self._stage: time.perf_counter() - self._since})
        self._since = None
