"""`outlierq sweep`: many recipes over one model from one calibration, each measured, in one table.

What was done is kept in `sweep.json`, row by row: the same command goes on where it stopped, and with more recipes it
runs those that are new.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from outlierq.core.errors import ArgumentError, OutlierqError, OutputError, RecipeError
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.machine.untrusted import json_object
from outlierq.core.model import Checkpoint
from outlierq.core.report import Evaluation, Report
from outlierq.export.clients import EXPERTS
from outlierq.load import check_recorded, open_checkpoint, result_in
from outlierq.pipeline.asked.request import Source, folder_of, write_file
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.compress import Run, compress
from outlierq.pipeline.measuring.cache import key_of
from outlierq.pipeline.measuring.measure import Measurement, check_measurement, measure, unmeasured
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Calibration, Recipe, RecipeLike, Settings, given
from outlierq.recipe.faults import impossible

SWEPT = "sweep.json"
STATS = "stats"
CLEAR_PEAK = "/proc/self/clear_refs"  # "5" written there makes the largest resident memory start anew (proc(5))


@dataclass(frozen=True)
class SweepRow:
    """One recipe. key: what it was made of. fault: why it could not run, "" when it did; all figures are None then.

    cpu_seconds: of the process, without calibration where statistics served. clients: lines of `Plan.clients`.
    """

    name: str
    key: str
    fault: str = ""
    folder: str = ""
    nbytes: int | None = None
    bits_per_weight: float | None = None
    quantized_bits_per_weight: float | None = None
    kl: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    cpu_seconds: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    scores: Mapping[str, float] | None = None
    clients: Sequence[str] = ()

    @property
    def loads_in(self) -> str:
        """The clients that load the result, by their first words."""
        lines = (line.partition(": ") for line in self.clients)
        return ", ".join(name for name, _, what in lines if what.startswith("loads") and EXPERTS not in name)


@dataclass(frozen=True)
class Sweep:
    """All rows, in the order that they were asked for. source_bytes, perplexity: of the original."""

    model: str
    source_bytes: int
    perplexity: float | None
    rows: tuple[SweepRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        rows = [asdict(row) | {"loads_in": row.loads_in} for row in self.rows]
        return {"model": self.model, "source_bytes": self.source_bytes, "perplexity": self.perplexity, "rows": rows}

    def cells(self) -> list[list[str]]:
        """The table as text, titles first: smallest KL first, and what could not run at the end."""
        scores = sorted({name for row in self.rows for name in row.scores or ()})
        titles = ["recipe", "bytes", "bits", "KL", "perplexity", "top-1", *scores, "CPU s", "peak MiB", "loads in"]
        order = sorted(self.rows, key=lambda row: (row.kl is None, row.kl or 0.0))
        return [titles, *([row.name, *_figures(row, scores), row.fault or row.loads_in] for row in order)]

    def markdown(self) -> str:
        """The table for a README."""
        titles, *rows = self.cells()
        lines = [titles, ["---"] * len(titles), *rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)

    def csv(self) -> str:
        """The table for a spreadsheet."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.cells())
        return text.getvalue()


def _figures(row: SweepRow, scores: Sequence[str]) -> list[str]:
    """The figures of a row as text, empty where there is none."""
    held = row.scores or {}
    peak = None if row.peak_bytes is None else row.peak_bytes >> 20
    values: list[tuple[float | None, str]] = [
        (row.nbytes, "d"),
        (row.bits_per_weight, ".2f"),
        (row.kl, ".4f"),
        (row.perplexity, ".3f"),
        (row.top1, ".4f"),
        *((held.get(name), ".4f") for name in scores),
        (row.cpu_seconds, ".0f"),
        (peak, "d"),
    ]
    return ["" if value is None else format(value, kind) for value, kind in values]


@dataclass(frozen=True)
class Asked:
    """One recipe of a sweep. name: of its folder."""

    name: str
    recipe: Recipe


def asked_recipes(
    recipes: Sequence[RecipeLike], bits: Sequence[int], settings: Settings = None, *, trust_methods: bool = False
) -> list[Asked]:
    """Every recipe, at each number of bits where some are given; a name that comes twice is refused.

    RecipeError when a recipe cannot be read; one that cannot have so many bits is a row of the table.
    """
    if not recipes:
        raise ArgumentError("there are no recipes; give some by -r", argument="recipe")
    asked: list[Asked] = []
    for each in recipes:
        base = given(each, settings, trust_methods=trust_methods)
        counts: Sequence[int | None] = bits or (None,)
        for count in counts:
            name = base.name if count is None else f"{base.name}-{count}-bit"
            asked.append(Asked(name, base if count is None else _with_bits(base, count)))
    names = [one.name for one in asked]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(f"{twice[0]} was asked for twice", argument="recipe")
    return asked


def _with_bits(base: Recipe, bits: int) -> Recipe:
    """The recipe with another number of bits; what is wrong with that, its plan says."""
    if base.quantize is None:
        return base
    return base.model_copy(update={"quantize": base.quantize.model_copy(update={"bits": bits})})


def sweep(
    source: Source,
    asked: Sequence[Asked],
    out: Path,
    measurement: Measurement,
    *,
    told: Callable[[SweepRow], Any] = lambda row: None,
    resources: Resources = USUAL,
) -> Sweep:
    """Calibrate once, run every recipe that has no row yet, measure its result, and keep the row.

    told: is given every row. OutlierqError, before any work, when no recipe can run or the text cannot be read.
    """
    checkpoint = source.open()
    check_recorded(checkpoint)
    check_measurement(checkpoint, measurement)
    plans = {one.name: _planned(checkpoint, one.recipe) for one in asked}
    if not any(isinstance(plan, Plan) for plan in plans.values()):
        raise RecipeError("; ".join(f"{name}: {fault}" for name, fault in plans.items()))
    folder = folder_of(out)
    done = _rows(folder)
    for one in asked:
        key = _key(checkpoint, one.recipe, measurement)
        plan, row = plans[one.name], done.get(one.name)
        if row is None or row.key != key or (row.folder and not (folder / row.folder).is_dir()):
            row = _run(source, one, plan, key, folder, measurement, resources)
            done[one.name] = row
            _keep(folder, done)
        told(row)
    original = measure(checkpoint, None, measurement, resources=resources)
    size = next(plan.source_bytes for plan in plans.values() if isinstance(plan, Plan))
    swept = Sweep(checkpoint.source, size, original.perplexity, tuple(done[one.name] for one in asked))
    write_file(folder / "sweep.md", swept.markdown().encode())
    write_file(folder / "sweep.csv", swept.csv().encode())
    return swept


def _planned(checkpoint: Checkpoint, recipe: Recipe) -> Plan | str:
    """The plan, or why there is none."""
    faults = impossible(recipe)
    if faults:
        return "; ".join(faults)
    try:
        return make_plan(checkpoint, recipe)
    except OutlierqError as error:
        return error.what


def _key(checkpoint: Checkpoint, recipe: Recipe, measurement: Measurement) -> str:
    """What a row is made of."""
    conditions = json.dumps(asdict(measurement), default=str)
    return key_of({"model": checkpoint.fingerprint, "recipe": recipe.fingerprint, "measurement": conditions})


def _run(
    source: Source, one: Asked, plan: Plan | str, key: str, folder: Path, measurement: Measurement, resources: Resources
) -> SweepRow:
    """Compress and measure; a recipe that cannot run is a row with its fault."""
    if not isinstance(plan, Plan):
        return SweepRow(one.name, key, fault=plan)
    _start_peak_anew()
    checkpoint = source.open()
    stats = _statistics(checkpoint, one.recipe, folder, resources)
    started = time.process_time()
    report = unmeasured(folder / one.name, plan)  # of a sweep that was stopped between this run and its row
    spent = None if report else 0.0
    if report is None:
        report = compress(source, one.recipe, folder / one.name, Run(stats=stats), resources)
        spent = time.process_time() - started
    written = open_checkpoint(os.fspath(result_in(folder / one.name)), trust_remote_code=checkpoint.trust_remote_code)
    return _row(one, key, plan, report, measure(written, checkpoint, measurement, resources=resources), spent)


def _row(one: Asked, key: str, plan: Plan, report: Report, measured: Evaluation, cpu_seconds: float | None) -> SweepRow:
    """What came of a recipe."""
    return SweepRow(
        one.name,
        key,
        folder=one.name,
        nbytes=report.output_bytes,
        bits_per_weight=report.bits_per_weight,
        quantized_bits_per_weight=report.quantized_bits_per_weight,
        kl=measured.kl,
        perplexity=measured.perplexity,
        top1=measured.top1,
        cpu_seconds=cpu_seconds,
        seconds=report.total_seconds,
        peak_bytes=report.peak_bytes,
        scores=measured.scores,
        clients=plan.clients,
    )


def _statistics(checkpoint: Checkpoint, recipe: Recipe, folder: Path, resources: Resources) -> Path | None:
    """The statistics of the sweep, made when a recipe first needs them; None for a recipe that cannot use them."""
    settings = recipe.calibration
    apart = recipe.rewrites or recipe.permutations or recipe.pruning
    if not recipe.needs or apart or settings is None or settings.runs:
        return None
    text = settings.model_copy(update={"sink_weight": Calibration().sink_weight, "min_expert_tokens": None})
    stats = folder / f"{STATS}-{_digest(text)}"
    calibrate(checkpoint, settings, stats, resources=resources)
    return stats


def _digest(settings: Calibration) -> str:
    """Of the settings that statistics depend on."""
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]


def _start_peak_anew() -> None:
    """Let the largest resident memory be that of the next run, where the system can."""
    try:
        Path(CLEAR_PEAK).write_text("5")
    except OSError:
        return  # then a row has the largest so far


def _rows(folder: Path) -> dict[str, SweepRow]:
    """What an earlier run has written."""
    path = folder / SWEPT
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty and holds no sweep", hint="give a new folder")
        return {}
    values = json_object(path.read_bytes(), str(path))
    known = {field.name for field in fields(SweepRow)}
    rows = [SweepRow(**{name: value for name, value in row.items() if name in known}) for row in values.get("rows", [])]
    return {row.name: row for row in rows}


def _keep(folder: Path, rows: Mapping[str, SweepRow]) -> None:
    """Keep what is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / SWEPT, json.dumps({"rows": [asdict(row) for row in rows.values()]}, indent=1).encode()
        )
    except OSError as error:
        raise OutputError(f"cannot write {folder / SWEPT}: {error.strerror or error}") from error
