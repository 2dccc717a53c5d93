"""`Limits`: what a quality gate allows, how its words are read ("3%", "mmlu:-1.0"), and what it says of values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from outlierq.core.errors import ArgumentError, GateError

Read = TypeVar("Read")

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

    @classmethod
    def of(
        cls,
        max_kl: float | None = None,
        max_perplexity_increase: str | float | None = None,
        min_top1: str | float | None = None,
        min_task: Sequence[str] | None = None,
    ) -> Limits:
        """The limits in words: shares as `3%` or 0.03, tasks as `mmlu:-1.0`. ArgumentError names what is none."""
        return cls(
            max_kl,
            _read("max_perplexity_increase", share, max_perplexity_increase),
            _read("min_top1", share, min_top1),
            tuple(filter(None, (_read("min_task", TaskLimit.parse, text) for text in min_task or ()))),
        )

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


@dataclass(frozen=True)
class GateRow:
    """One limit. name: measure with its unit. relation: "<=" or ">=", as in `value relation limit`."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the value keeps the limit; a value equal to the limit does."""
        return self.value <= self.limit if self.relation == "<=" else self.value >= self.limit

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"{verdict}  {self.name:<34} {self.value:>10.5g} {self.relation} {self.limit:<10.5g}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report, with the verdict."""
        return vars(self) | {"passed": self.passed}


def raise_if_failed(rows: Sequence[GateRow]) -> None:
    """GateError with the table of all rows when one of them failed."""
    failed = [row for row in rows if not row.passed]
    if failed:
        table = "\n".join(f"  {row}" for row in rows)
        raise GateError(
            f"{len(failed)} of {len(rows)} quality limits failed\n{table}",
            hint="use more bits, smaller groups or a stronger method, or widen the limit",
        )


def _read(name: str, parse: Callable[[Any], Read], value: Any) -> Read | None:
    """One limit, None when it is not asked for."""
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        raise ArgumentError(str(error), argument=name) from None


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
