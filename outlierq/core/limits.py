"""`Limits`: what a quality gate allows, and how its words are read ("3%", "mmlu:-1.0")."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

TASK_LIMIT = re.compile(r"(?P<task>[^\s:/]+)(?:/(?P<metric>[^\s:]+))?:(?P<sign>[+-]?)(?P<points>\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class TaskLimit:
    """The least a task may score, in points of 100.

    points: with `relative` the least change against the original (-1.0: one point may be lost), else the least score.
    metric: None is `acc_norm` where the task has it, else `acc`.
    """

    task: str
    points: float
    relative: bool
    metric: str | None = None

    def __str__(self) -> str:
        metric = f"/{self.metric}" if self.metric else ""
        return f"{self.task}{metric}:{self.points:+g}" if self.relative else f"{self.task}{metric}:{self.points:g}"

    @classmethod
    def parse(cls, text: str) -> TaskLimit:
        """`mmlu:-1.0` (at most one point below the original), `mmlu:40` (at least 40 points), `arc_easy/acc:-2`.

        ValueError says what is expected.
        """
        match = TASK_LIMIT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a limit on a task; write mmlu:-1.0, arc_easy/acc_norm:-2 or mmlu:40")
        points = float(match["sign"] + match["points"])
        if abs(points) > 100:
            raise ValueError(f"{text!r}: points are of 100")
        return cls(match["task"], points, bool(match["sign"]), match["metric"])


@dataclass(frozen=True)
class Limits:
    """A quality gate. None and () mean that nothing is asked.

    max_kl: nats per token. max_perplexity_increase: relative, 0.03 is 3 %. min_top1: share of positions, 0..1.
    min_task: the least scores of tasks.
    """

    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    min_top1: float | None = None
    min_task: tuple[TaskLimit, ...] = ()

    def __bool__(self) -> bool:
        return self != Limits()

    @property
    def on_text(self) -> bool:
        """Whether a text has to be measured beside the original."""
        return any(limit is not None for limit in (self.max_kl, self.max_perplexity_increase, self.min_top1))

    @property
    def needs_reference(self) -> bool:
        """Whether the original has to be measured as well."""
        return self.on_text or any(limit.relative for limit in self.min_task)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are limited, each once."""
        return tuple(dict.fromkeys(limit.task for limit in self.min_task))


def share(value: Any) -> float:
    """0.03 of `3%`, `3 %`, `0.03` or 0.03; ValueError otherwise."""
    text = str(value).strip()
    number = text.removesuffix("%").strip()
    try:
        parsed = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        parsed = math.nan
    if isinstance(value, bool) or not math.isfinite(parsed):
        raise ValueError(f"{value!r} is not a share; write for example 3% or 0.03")
    return parsed
