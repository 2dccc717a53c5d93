"""The quality gate: what was measured, held against limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outlierq.core.errors import OutlierqError
from outlierq.core.limits import GateRow, Limits, TaskLimit

# What a task is judged by when the limit names no metric: the first of these that it has.
USUAL_METRICS = ("acc_norm", "acc", "exact_match (strict-match)", "exact_match")


def check_gate(results: Mapping[str, Any], limits: Limits) -> list[GateRow]:
    """One row for every limit that is given.

    results: "divergence" holds `Divergence.to_dict()`, "tasks" and "reference_tasks" what `run_tasks` returned for the
    model and for the original. OutlierqError names a figure that a limit needs and that was not measured.
    """
    divergence = results.get("divergence") or {}
    on_text = (
        ("KL divergence per token (nats)", divergence.get("kl_per_token"), "<=", limits.max_kl),
        ("perplexity increase (relative)", _perplexity_increase(divergence), "<=", limits.max_perplexity_increase),
        ("top-1 agreement (share)", divergence.get("top1_agreement"), ">=", limits.min_top1),
    )
    rows = [
        GateRow(name, _known(name, value), relation, limit)
        for name, value, relation, limit in on_text
        if limit is not None
    ]
    return rows + [_task_row(limit, results) for limit in limits.min_task]


def _task_row(limit: TaskLimit, results: Mapping[str, Any]) -> GateRow:
    """The row of one task, in points of 100."""
    metric, score = _score(limit, results.get("tasks"), "the model")
    name = f"{limit.task} {metric} (points)"
    if not limit.relative:
        return GateRow(name, score, ">=", limit.points)
    _, before = _score(limit, results.get("reference_tasks"), "the original")
    # Scores are fractions of whole samples; float noise must not fail a limit that is just kept.
    return GateRow(f"{name}, change", round(score - before, 9), ">=", limit.points)


def _score(limit: TaskLimit, measured: Mapping[str, Any] | None, whose: str) -> tuple[str, float]:
    """The metric that counts, and its value in points of 100."""
    rows = {row["metric"]: row["value"] for row in (measured or {}).get("rows", ()) if row["task"] == limit.task}
    if not rows:
        raise OutlierqError(
            f"the gate needs task `{limit.task}` of {whose}, which was not run",
            hint=f"measure with --tasks {limit.task}" + (" and --reference" if whose == "the original" else ""),
        )
    metrics = (limit.metric,) if limit.metric else USUAL_METRICS
    name = next((metric for metric in metrics if metric in rows), None)
    if name is None:
        raise OutlierqError(
            f"task `{limit.task}` has no metric {' or '.join(metrics)}; it has {', '.join(rows)}",
            hint=f"name one that is a share, larger is better: {limit.task}/METRIC:{limit.points:g}",
        )
    if not 0 <= rows[name] <= 1:
        raise OutlierqError(
            f"{name} of task `{limit.task}` is {rows[name]:g}, which is no share of right answers",
            hint="limit a perplexity with max_perplexity_increase",
        )
    return name, 100 * rows[name]


def _perplexity_increase(divergence: Mapping[str, Any]) -> float | None:
    """Relative increase over the reference, None without one."""
    reference: float | None = divergence.get("reference_perplexity")
    return None if reference is None else float(divergence["perplexity"]) / reference - 1


def _known(name: str, value: float | None) -> float:
    """The value, or an error that says how to get it."""
    if value is None:
        raise OutlierqError(f"the gate needs {name}, which is unknown", hint="measure with the original as reference")
    return value
