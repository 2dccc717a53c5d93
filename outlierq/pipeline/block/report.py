"""The report of a run, made of its plan and its journal."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outlierq import __version__
from outlierq.calibrate.groups import NOT_RUN
from outlierq.core.machine.heap import peak_bytes
from outlierq.core.notes import counted_together
from outlierq.core.report import STORED, Report, SiteRow
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.starved import STARVED
from outlierq.pipeline.block.stats import StatsSource
from outlierq.pipeline.ledger.clock import Clock
from outlierq.pipeline.ledger.journal import Journal
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.processes.ranks import Ranks
from outlierq.pipeline.remodel.rewrite import original_of

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors")


def make_report(
    plan: Plan,
    out: Path,
    journal: Journal,
    clock: Clock,
    source: StatsSource,
    rewrite_error: float | None = None,
    resources: Resources = USUAL,
) -> Report:
    """Everything that was done, from the journal (so that a resumed run reports all of its blocks).

    rewrite_error: how far a rewritten model's logits were from the original's, None without a rewrite.
    """
    rows = journal.rows
    transforms = tuple(row for entry in journal.entries.values() for row in entry["transforms"])
    calibration = None if source.calibration is None else dict(source.calibration)
    noted = [note for entry in journal.entries.values() for note in entry["notes"]]
    # What is said of a starved expert's linears is said once for the block, too.
    said_once = (STARVED, NOT_RUN)
    noted += counted_together((row.site, row.note) for row in rows if row.note and not row.note.startswith(said_once))
    noted += carried_note(rows)
    if rewrite_error is not None:
        noted.append(f"the rewritten model's float32 logits differ by {rewrite_error:.1e} from the original's")
    return Report(
        model=plan.checkpoint.source,
        recipe=plan.recipe.name,
        settings=plan.recipe.model_dump(mode="json") | ({"calibration": calibration} if calibration else {}),
        out=str(out),
        fingerprint=original_of(plan.checkpoint).fingerprint,
        versions={"outlierq": __version__, "python": platform.python_version()}
        | {p: version(p) for p in PACKAGES}
        | plan.recipe.outside_code,
        seeds=({} if source.seed is None else {"calibration": source.seed})
        | {step.method: step.options.get("seed", 0) for step in plan.recipe.rewrites},
        machine=_machine(resources.device, resources.ranks),
        rows=rows,
        transforms=transforms,
        notes=(*plan.notes, *([source.remark] if source.remark else []), *noted),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        quantized_bits_per_weight=plan.quantized_bits_per_weight,
        source_bits_per_weight=8 * plan.source_bytes / plan.parameters,
        quantized_share=plan.quantized_share,
        seconds=dict(journal.seconds + clock.seconds),
        peak_bytes=peak_bytes(),
        clients=tuple(plan.clients),
    )


def carried_note(rows: Sequence[SiteRow]) -> list[str]:
    """How many weights lost nothing, where some were numbers of their new grid already."""
    carried = [row for row in rows if row.weight_error == 0 and row.method != STORED]
    if not carried:
        return []
    numbers = " and ".join(sorted({row.numbers for row in carried}))
    return [f"{len(carried)} of {len(rows)} quantized weights are carried bit for bit: they are numbers of {numbers}"]


def _machine(device: str, ranks: Ranks) -> dict[str, Any]:
    """What the run used."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    several = {"processes": ranks.size} if ranks.size > 1 else {}
    threads = {"threads": torch.get_num_threads()}
    return {"device": device, "name": name, **threads, **several, "system": platform.system()}
