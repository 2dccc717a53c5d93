"""The main job: load -> calibrate -> transform -> quantize -> export, one block at a time, resumable and verified."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq import __version__
from outlierq.core.errors import RecipeError, during
from outlierq.core.model import Block, InputGroup, LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import Report, SiteRow
from outlierq.core.stats import InputStats
from outlierq.export.writer import write_small
from outlierq.pipeline.calibration import NoStats, StatsFromFile, StatsFromRun, StatsSource, token_set
from outlierq.pipeline.events import Event, Listener, peak_bytes, return_freed_memory, silent
from outlierq.pipeline.journal import Journal, finish, working
from outlierq.pipeline.output import Output, as_matrix, from_matrix
from outlierq.pipeline.plan import OUTSIDE, REPORT_NAME, Plan, unit_name
from outlierq.quantize.stage import quantize_group
from outlierq.registry import method

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors")


def quantize(
    plan: Plan,
    out: Path,
    *,
    stats: Path | None = None,
    device: str = "cpu",
    restart: bool = False,
    listen: Listener = silent,
) -> Report:
    """Carry out a plan and put the result at `out`; the report is also written there as outlierq.json.

    stats: a folder of `outlierq calibrate` to use instead of running the model. An interrupted run continues.
    """
    with working(out, restart=restart) as work:
        clock = Clock()
        with clock("calibrate"):
            source = _stats_source(plan, work, stats, device, listen)
        journal = Journal(work, _identity(plan, source))
        output = Output(plan, work, journal)
        try:
            run = _Run(plan, source, output, clock, device, listen)
            run.outside()
            for block in plan.structure.blocks:
                run.block(block)
            with clock("verify"):
                write_small(work, plan.small_files)
                output.verify()
        finally:
            output.close()
        report = _report(plan, out, journal, clock, device, source)
        write_small(work, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        finish(work, out, {*plan.small_files, *plan.layout.sizes, REPORT_NAME})
    return report


class Clock:
    """Adds up wall seconds by stage: `with clock("export"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def __call__(self, stage: str) -> Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + time.perf_counter() - self._since


class _Run:
    """The units of one plan, one after another."""

    def __init__(self, plan: Plan, source: StatsSource, output: Output, clock: Clock, device: str, listen: Listener):
        self.plan, self.source, self.output = plan, source, output
        self.clock, self.device, self.listen = clock, device, listen
        self.schemes = plan.schemes
        calibration = plan.recipe.calibration
        self.sink_weight = calibration.sink_weight if calibration else 1.0
        self.error: float | None = None

    def outside(self) -> None:
        """Write what lies outside of the blocks; linears there are rounded without statistics when they are asked."""
        if OUTSIDE in self.output.journal.entries:
            return
        structure = self.plan.structure
        sites = structure.outside_sites
        names = structure.outside_tensors + tuple(n for s in sites for n in (s.weight, s.bias) if n is not None)
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        for site in sites:
            if site in self.schemes:
                results |= self._round(site)
        with self.clock("export"):
            self.output.write(OUTSIDE, names, results)

    def block(self, block: Block) -> None:
        """Calibrate, transform, quantize, write and verify one block, or carry on past a finished one."""
        self.listen(Event("quantize", block.index, len(self.plan.structure.blocks), block.name, self.error))
        unit = unit_name(block.index)
        if unit in self.output.journal.entries:
            with self.clock("calibrate"):
                self.source.replay(block.index, lambda: self.output.written(block))
            return
        with during("calibrate", block.name), self.clock("calibrate"):
            groups, stats = self.source.block(block.index)
            stats = {name: kept.weighing_sinks(self.sink_weight) for name, kept in stats.items()}
        return_freed_memory()
        tensors = self._read(block)
        with during("transform", block.name), self.clock("transform"):
            stats, transforms = self._transform(block, groups, stats, tensors)
        with self.clock("quantize"):
            results = self._quantize(groups, stats, tensors)
        with during("export", block.name), self.clock("export"):
            folded = {name: tensors[name] for row in transforms for name in row.pop("folded")}
            self.output.write(unit, block.tensors, results, self._as_stored(folded), transforms, self.source.notes)
        del tensors, stats, results
        with self.clock("calibrate"):
            self.source.finished(block.index, lambda: self.output.written(block))
        return_freed_memory()

    def _read(self, block: Block) -> dict[str, torch.Tensor]:
        """The block's tensors on the device, as stored."""
        from outlierq.load.skeleton import read_all

        return {name: t.to(self.device) for name, t in read_all(self.plan.checkpoint, block.tensors).items()}

    def _as_stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Folded tensors in the dtype that the plan gives them."""
        from outlierq.load.shards import torch_dtype

        infos = self.plan.checkpoint.tensors
        return {name: tensor.to(torch_dtype(infos[name].dtype)).cpu() for name, tensor in tensors.items()}

    def _transform(
        self, block: Block, groups: list[InputGroup], stats: dict[str, InputStats], tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, InputStats], list[dict[str, Any]]]:
        """Scale each group's input and fold the inverse into its producer; `tensors` get the new values."""
        if not self.plan.recipe.transform:
            return stats, []
        from outlierq.pipeline.folding import transform_group

        steps = [(method("transform", t.method), t.options) for t in self.plan.recipe.transform]
        before, done, rows = dict(tensors), dict(stats), []
        for group in groups:
            schemes = [self.schemes[s] for s in group.sites if s in self.schemes]
            if schemes and group.name in stats:
                narrowest = min(schemes, key=lambda scheme: scheme.bits)
                done[group.name], row = transform_group(
                    group, stats[group.name], narrowest, tensors, steps, self.plan.checkpoint
                )
                rows.append({"block": block.index, **row})
        self.source.check_transformed(block.index, before, tensors)
        return done, rows

    def _quantize(
        self, groups: list[InputGroup], stats: Mapping[str, InputStats], tensors: Mapping[str, torch.Tensor]
    ) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """Quantize every group of the block."""
        chosen = self.plan.recipe.quantize
        if chosen is None:
            return {}
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        for group in groups:
            weights = {s: as_matrix(s, tensors[s.weight]) for s in group.sites}
            results |= quantize_group(
                weights, self.schemes, stats.get(group.name), method("quantize", chosen.method), chosen.options
            )
        errors = [row.output_error for _, row in results.values() if row.output_error is not None]
        self.error = sum(errors) / len(errors) if errors else None
        return results

    def _round(self, site: LinearSite) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """A linear outside of the blocks has no statistics: round it to nearest, and say so."""
        weight = as_matrix(site, self.plan.checkpoint.read(site.weight).to(self.device))
        options = {} if not self.plan.recipe.needs else {"scale_search": "mse"}
        done = quantize_group({site: weight}, self.schemes, None, method("quantize", "rtn"), options)
        quantized, row = done[site]
        return {site: (quantized, replace(row, note="outside of the blocks: rounded to nearest, no statistics"))}


def _dense(results: Mapping[LinearSite, tuple[QuantTensor, SiteRow]]) -> dict[str, torch.Tensor]:
    """The quantized linears as the dense tensors they stand for."""
    return {site.weight: from_matrix(site, quantized.dequantize()) for site, (quantized, _) in results.items()}


def _stats_source(plan: Plan, work: Path, stats: Path | None, device: str, listen: Listener) -> StatsSource:
    """Where statistics come from: nowhere, a file, or the model itself."""
    needs, recipe = plan.recipe.needs, plan.recipe
    if not needs:
        unused = f"{recipe.name} needs no statistics; those in {stats} were not used" if stats else ""
        return NoStats(plan.structure, remark=unused)
    if stats is not None:
        if recipe.calibration.mode == "sequential":
            raise RecipeError(
                f"calibration.mode is sequential, which runs the model; the statistics in {stats} are static",
                hint="leave --stats out, or --set calibration.mode=static",
            )
        return StatsFromFile(stats, plan.checkpoint, plan.structure, needs)
    from outlierq.calibrate.collect import stored_fields

    tokens = token_set(plan.checkpoint, recipe.calibration)
    return StatsFromRun(
        plan.skeleton,
        plan.checkpoint,
        plan.structure,
        plan.names,
        tokens,
        recipe.calibration,
        fields=stored_fields(needs),
        work=work,
        device=device,
        listen=listen,
    )


def _identity(plan: Plan, source: StatsSource) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    made_with = {"outlierq": __version__, "source": plan.checkpoint.fingerprint, "recipe": plan.recipe.fingerprint}
    return made_with | source.identity


def _report(plan: Plan, out: Path, journal: Journal, clock: Clock, device: str, source: StatsSource) -> Report:
    """Everything that was done, from the journal (so that a resumed run reports all of its blocks)."""
    rows = tuple(SiteRow(**row) for entry in journal.entries.values() for row in entry["rows"])
    transforms = tuple(row for entry in journal.entries.values() for row in entry["transforms"])
    noted = [note for entry in journal.entries.values() for note in entry["notes"]]
    noted += [f"{row.site}: {row.note}" for row in rows if row.note]
    return Report(
        model=plan.checkpoint.source,
        recipe=plan.recipe.name,
        settings=plan.recipe.model_dump(mode="json"),
        out=str(out),
        fingerprint=plan.checkpoint.fingerprint,
        versions={"outlierq": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        seeds={} if source.seed is None else {"calibration": source.seed},
        machine=_machine(device),
        rows=rows,
        transforms=transforms,
        notes=(*plan.notes, *([source.remark] if source.remark else []), *noted),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        quantized_bits_per_weight=plan.quantized_bits_per_weight,
        source_bits_per_weight=8 * plan.source_bytes / plan.parameters,
        seconds=dict(clock.seconds),
        peak_bytes=peak_bytes(),
    )


def _machine(device: str) -> dict[str, Any]:
    """What the run used."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "system": platform.system()}
