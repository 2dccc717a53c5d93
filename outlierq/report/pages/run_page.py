"""A whole run as one HTML file that needs nothing else: size, loss, gate, errors by block, samples, provenance."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outlierq.core.report import Evaluation, Report, SiteRow
from outlierq.pipeline.asked.request import refuse_unwritable
from outlierq.pipeline.measuring.run_report import RunReport
from outlierq.report.pages.drawing import (
    BOTTOM,
    LEFT,
    PAGE,
    RIGHT,
    TOP,
    WIDTH,
    Panel,
    Picture,
    line,
    powers,
    text,
    ticks,
    titled,
)
from outlierq.report.pages.outlier_pictures import percent
from outlierq.report.pages.page import model_name, render, write
from outlierq.report.terminal import UNKNOWN, human_bytes, human_seconds

BLOCK = re.compile(r"\.(\d+)\.")
ENDING = ".report.html"


def page_place(run: Path, out: Path | None) -> Path:
    """Where the page goes: as asked, or beside the result. OutlierqError before any work when it cannot be written."""
    place = out or run.with_name(f"{run.name}{ENDING}")
    refuse_unwritable(place)
    return place


def write_run_page(run: RunReport, path: Path) -> None:
    """Write the page, all of it or nothing; OutputError when that is not possible."""
    write(path, run_page(run).encode())


def run_page(run: RunReport) -> str:
    """The HTML text."""
    report = run.report
    evaluation = report.evaluation or Evaluation()
    owner, _, name = model_name(report.model).rpartition("/")
    return render(
        "run_page",
        name=name,
        owner=owner,
        recipe=Path(report.recipe).name,
        headline=_headline(report),
        answers=[_size(report), _loss(report, evaluation), _gate(evaluation)],
        treatments=_treatments(report.rows),
        pictures=(_errors(report.rows), _depth(evaluation)),
        limits=_limits(evaluation),
        measured=_measured(evaluation),
        tasks=_tasks(evaluation),
        caches=_caches(report),
        advice=(report.cache or {}).get("advice", ""),
        samples=run.samples,
        facts=_facts(report, evaluation),
        commands=_commands(report, run.place),
        settings=_yaml(report.settings),
        notes=report.notes,
    )


# The answers on top


def _headline(report: Report) -> str:
    numbers = ", ".join(sorted({row.numbers or f"{row.bits} bits" for row in report.rows})) or "no quantized weights"
    share = (
        "" if report.quantized_share is None else f"; {100 * report.quantized_share:.0f}\u202f% of the linear weights"
    )
    return f"Compressed to {numbers}{share}, {report.bits_per_weight:.2f} bits per weight in all."


def _size(report: Report) -> dict[str, Any]:
    sizes = f"{human_bytes(report.source_bytes)} before, {human_bytes(report.output_bytes)} after"
    return {"question": "Size", "figure": f"{report.size_ratio:.2f}× smaller", "remark": sizes, "alarm": False}


def _loss(report: Report, evaluation: Evaluation) -> dict[str, Any]:
    """KL where it was measured, else the errors of single linears."""
    if evaluation.kl is not None:
        remark = "nats per token, the KL divergence from the original"
        if evaluation.top1 is not None:
            remark += f"; the same most likely token at {100 * evaluation.top1:.1f}\u202f% of the positions"
        return {"question": "Loss", "figure": f"{evaluation.kl:.4f}", "remark": remark, "alarm": False}
    errors = [row.output_error for row in report.rows if row.output_error is not None]
    remark = "The result was not measured beside its original: `outlierq eval --record` adds that."
    if not errors:
        return {"question": "Loss", "figure": "not measured", "remark": remark, "alarm": False}
    figure = f"{percent(statistics.fmean(errors))} output error"
    return {
        "question": "Loss",
        "figure": figure,
        "remark": f"mean over {len(errors)} linears. {remark}",
        "alarm": False,
    }


def _gate(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.passed is None:
        return {"question": "Gate", "figure": "none", "remark": "no limit was set", "alarm": False}
    failed = [row.name for row in evaluation.gate_rows if not row.passed]
    remark = f"over the limit: {', '.join(failed)}" if failed else f"limits kept: {len(evaluation.gate_rows)}"
    figure = "passed" if evaluation.passed else "failed"
    return {"question": "Gate", "figure": figure, "remark": remark, "alarm": not evaluation.passed}


# Tables


def _treatments(rows: Sequence[SiteRow]) -> list[dict[str, Any]]:
    """What kinds of linears became, and how well that went; the worst kind first."""
    kinds: dict[tuple[str, str], list[SiteRow]] = {}
    for row in rows:
        size = "per channel" if row.group_size is None else f"g{row.group_size}"
        treatment = f"{row.method} {row.numbers or f'{row.bits} bits'} {size}"
        kinds.setdefault((row.site.rpartition(".")[2], treatment), []).append(row)
    table = []
    for (kind, treatment), some in kinds.items():
        errors = [row.output_error for row in some if row.output_error is not None]
        name = "output" if errors else "weight"
        errors = errors or [row.weight_error for row in some]
        table.append(
            {
                "kind": kind,
                "count": len(some),
                "treatment": treatment,
                "bits": f"{statistics.fmean(row.bits_per_weight for row in some):.2f}",
                "error": name,
                "mean": percent(statistics.fmean(errors)),
                "worst": percent(max(errors)),
                "rank": max(errors),
            }
        )
    return sorted(table, key=lambda each: -each["rank"])


def _measured(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(figure, before, after) of what was measured on a text."""
    rows = []
    if evaluation.perplexity is not None:
        rows.append(("perplexity", _number(evaluation.reference_perplexity), _number(evaluation.perplexity)))
    if evaluation.kl is not None:
        error = evaluation.kl_standard_error
        spread = "" if error is None else f" ± {error:.4f}"
        rows.append(("KL divergence per token, nats", "0", f"{evaluation.kl:.4f}{spread}"))
    if evaluation.top1 is not None:
        rows.append(("the original's most likely token", "100\u202f%", f"{100 * evaluation.top1:.1f}\u202f%"))
    return rows


def _tasks(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(task and metric, before, after), without parts of tasks."""
    before = {
        (row["task"], row["metric"]): row["value"] for row in evaluation.get("reference_tasks", {}).get("rows", ())
    }
    rows = [row for row in evaluation.get("tasks", {}).get("rows", ()) if row.get("parent") is None]
    return [
        (f"{row['task']}, {row['metric']}", _number(before.get((row["task"], row["metric"]))), _number(row["value"]))
        for row in rows
    ]


def _caches(report: Report) -> list[tuple[str, str, str, str]]:
    """(cache, bits of a number, KL, what runs it) of every cache that was measured."""
    rows = (report.cache or {}).get("rows", ())
    return [
        (row["name"], _number(row["bits"]), _number(row["kl"]), row["flag"]) for row in rows if row["kl"] is not None
    ]


def _limits(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The gate, row by row."""
    return [
        {
            "name": row.name,
            "value": f"{row.value:.5g}",
            "allowed": f"{'≤' if row.relation == '<=' else '≥'} {row.limit:.5g}",
            "kept": row.passed,
        }
        for row in evaluation.gate_rows
    ]


def _number(value: float | None) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.4g}"


def _facts(report: Report, evaluation: Evaluation) -> list[tuple[str, str]]:
    """Where the result comes from, and what made it."""
    recorded = report.record or {}
    facts = [
        ("original", report.model),
        ("fingerprint of the original", report.fingerprint),
        ("recipe", report.recipe),
        ("written to", report.out),
        ("files with digests", str(len(recorded.get("files", {}))) if recorded else ""),
        ("versions", _listed(report.versions)),
        ("machine", _listed(report.machine)),
        ("seeds", _listed(report.seeds)),
        ("time", f"{human_seconds(report.total_seconds)} ({_listed(_spent(report.seconds))})"),
        ("largest memory", "" if report.peak_bytes is None else human_bytes(report.peak_bytes)),
        ("measured on", str(evaluation.get("text", ""))),
        ("measured by", str(evaluation.get("command") or "")),
    ]
    return [(name, value) for name, value in facts if value]


def _spent(seconds: Mapping[str, float]) -> dict[str, str]:
    return {stage: human_seconds(spent) for stage, spent in seconds.items() if spent >= 0.05}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", {}))


def _commands(report: Report, place: Path) -> list[tuple[str, str]]:
    """(what it is for, the words): do it again, check it, measure it."""
    model, out = report.model, str(place)
    return [
        ("do it again", shlex.join(["outlierq", "quantize", model, "-r", out, "-o", f"{out}-again"])),
        ("check every byte and every weight", shlex.join(["outlierq", "verify", out, "--source", model])),
        ("measure it beside the original", shlex.join(["outlierq", "eval", out, "--reference", model, "--record"])),
    ]


def _yaml(settings: Mapping[str, Any]) -> str:
    """The recipe as it was followed."""
    import yaml

    written: str = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
    return written.strip()


# Pictures


def _errors(rows: Sequence[SiteRow]) -> Picture:
    """The error of every linear by its block, one panel for every kind."""
    known = [row for row in rows if row.output_error is not None]
    name = "output" if known else "weight"
    kinds: dict[str, dict[int, float]] = {}
    for row in known or rows:
        block, error = BLOCK.search(row.site), row.output_error if known else row.weight_error
        if block and error is not None and math.isfinite(error) and error > 0:
            places = kinds.setdefault(row.site.rpartition(".")[2], {})
            places[int(block[1])] = max(error, places.get(int(block[1]), 0.0))
    bounds = [error for places in kinds.values() for error in places.values()]
    panels = [_points(kind, places, (min(bounds), max(bounds))) for kind, places in kinds.items()]
    lead = f"Relative {name} error of each linear against the original, block by block, on one scale; of experts the "
    lead += "worst."
    return Picture("errors", "Errors by block", lead, tuple(panels), "The run has no quantized linears in blocks.")


def _depth(evaluation: Evaluation) -> Picture:
    """How far hidden states are from the original's, after each block."""
    errors = evaluation.get("divergence", {}).get("hidden_errors") or ()
    places = {block: error for block, error in enumerate(errors) if math.isfinite(error) and error > 0}
    panels = [_points("hidden states", places, (min(places.values()), max(places.values())))] if places else []
    lead = "Squared difference of the hidden states from the original's after each block, over the original's power: "
    lead += "where the loss arises."
    absent = "Not measured. A gate, or `outlierq eval --reference ORIGINAL --record`, measures it."
    return Picture("depth", "Divergence by depth", lead, tuple(panels), absent)


def _points(title: str, places: Mapping[int, float], bounds: tuple[float, float]) -> Panel:
    """A point for every block on a logarithmic scale."""
    low, high = math.log10(0.8 * bounds[0]), math.log10(1.25 * bounds[1])
    tall, wide, blocks = 90.0, WIDTH - LEFT - RIGHT, sorted(places)
    step = wide / len(blocks)

    def y(value: float) -> float:
        return TOP + tall * (high - math.log10(value)) / (high - low)

    inside = powers((low, high), y, wide, PAGE) + line(LEFT, TOP + tall, LEFT + wide, TOP + tall, PAGE.rule)
    for place, block in enumerate(blocks):
        x = LEFT + (place + 0.5) * step
        dot = f'<circle cx="{x:.1f}" cy="{y(places[block]):.1f}" r="{min(2.6, step / 2):.1f}" fill="{PAGE.accent}">'
        inside += titled(dot, "circle", f"block {block}: {percent(places[block])}")
    inside += text(LEFT - 5, TOP + tall + 15, "block", PAGE.muted, "end")
    for place in ticks(blocks):
        inside += text(LEFT + (place + 0.5) * step, TOP + tall + 15, blocks[place], PAGE.muted, "middle")
    worst = max(places, key=places.__getitem__)
    remark = f"{percent(places[worst])} at worst, in block {worst}; {percent(_median(places.values()))} at the median"
    return Panel(title, remark, f"{title}: {len(blocks)} blocks, {remark}.", inside, TOP + tall + BOTTOM)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
