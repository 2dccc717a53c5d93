"""The main job: load -> calibrate -> transform -> quantize -> export, one block at a time, resumable and verified."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
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
from outlierq.pipeline.data_free import Unit, done_in_order, is_data_free, rounder
from outlierq.pipeline.events import Event, Listener, peak_bytes, return_freed_memory, silent
from outlierq.pipeline.experts import STARVED, check_static, least_tokens, shares, starved_note, tokens_of
from outlierq.pipeline.journal import Journal, finish, working
from outlierq.pipeline.output import Output, as_matrix, from_matrix
from outlierq.pipeline.plan import OUTSIDE, REPORT_NAME, Plan, unit_name
from outlierq.pipeline.rewriting import original_of, prove_rewrite
from outlierq.quantize.stage import quantize_group
from outlierq.registry import method

if TYPE_CHECKING:
    import torch

# Options of rounding to nearest for a linear whose input is not known, in a recipe that looks at inputs.
UNKNOWN_INPUT = {"scale_search": "mse"}
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
        with during("transform", "the whole model"), clock("transform"):
            rewrite_error = prove_rewrite(plan.checkpoint, plan.skeleton, plan.structure, plan.names, listen)
        with clock("calibrate"):
            source = _stats_source(plan, work, stats, device, listen)
        journal = Journal(work, _identity(plan, source), clock.spent)
        with journal.told_of_stops(), closing(Output(plan, work, journal)) as output:
            run = _Run(plan, source, output, clock, device, listen)
            run.data_free() if is_data_free(plan) else run.in_order()
            with clock("verify"):
                write_small(work, plan.small_files)
                output.verify()
        report = make_report(plan, out, journal, clock, device, source, rewrite_error)
        write_small(work, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        finish(work, out, {*plan.small_files, *plan.layout.sizes, REPORT_NAME})
    return report


class Clock:
    """Adds up wall seconds by stage: `with clock("export"): ...`."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stage, self._since = "", None
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
            now[self._stage] += time.perf_counter() - self._since
        told, self._told = self._told, now
        return {stage: now[stage] - told[stage] for stage in now}

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._stage] += time.perf_counter() - self._since
        self._since = None


class _Run:
    """The units of one plan, one after another."""

    def __init__(self, plan: Plan, source: StatsSource, output: Output, clock: Clock, device: str, listen: Listener):
        self.plan, self.source, self.output = plan, source, output
        self.clock, self.device, self.listen = clock, device, listen
        self.schemes = plan.schemes
        calibration = plan.recipe.calibration
        self.sink_weight = calibration.sink_weight if calibration else 1.0
        self.error: float | None = None
        chosen = plan.recipe.quantize
        self._least = least_tokens(calibration, method("quantize", chosen.method).needs if chosen else frozenset())

    def data_free(self) -> None:
        """All units, several at once; each goes into the journal in its turn."""
        blocks, journal = self.plan.structure.blocks, self.output.journal
        rounded = rounder(self.plan, self.device)
        outside = {site: lambda site: self._round(site)[site] for site in self._outside_sites()}
        units = [Unit(OUTSIDE, "what is outside of the blocks", self._outside_names(), outside)]
        for block in blocks:
            linears = {site: rounded for site in block.sites if site in self.schemes}
            units.append(Unit(unit_name(block.index), block.name, block.tensors, linears))
        places = {unit_name(block.index): block for block in blocks}
        waiting = [unit for unit in units if unit.name not in journal.entries]
        since = time.perf_counter()
        # Closed before the output is: no thread may write to a file that is closed.
        with closing(done_in_order(waiting, self.output, self.device)) as results:
            for done in results:
                if done.unit.name in places:
                    block = places[done.unit.name]
                    self.listen(Event("quantize", block.index, len(blocks), block.name))
                now = time.perf_counter()
                self.clock.share(now - since, done.seconds)
                since = now
                self.output.commit(done.unit.name, done.digests, done.rows)

    def in_order(self) -> None:
        """All units, one after another: each block may see what was made of those before it."""
        self.outside()
        for block in self.plan.structure.blocks:
            self.block(block)

    def _outside_sites(self) -> list[LinearSite]:
        """Linears outside of the blocks that are quantized."""
        return [site for site in self.plan.structure.outside_sites if site in self.schemes]

    def _outside_names(self) -> tuple[str, ...]:
        """Every tensor outside of the blocks."""
        structure = self.plan.structure
        of_sites = (name for site in structure.outside_sites for name in (site.weight, site.bias))
        return structure.outside_tensors + tuple(name for name in of_sites if name is not None)

    def outside(self) -> None:
        """Write what lies outside of the blocks; linears there are rounded without statistics when they are asked."""
        if OUTSIDE in self.output.journal.entries:
            return
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        for site in self._outside_sites():
            results |= self._round(site)
        with self.clock("export"):
            self.output.write(OUTSIDE, self._outside_names(), results)

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
        before = dict(tensors)
        with during("transform", block.name), self.clock("transform"):
            stats, transforms = self._transform(block, groups, stats, tensors)
            stats, moved = self._gather(block, groups, stats, tensors)
            transforms += moved
        with self.clock("quantize"):
            results = self._quantize(groups, stats, tensors)
        with during("export", block.name), self.clock("export"):
            quantized = {site.weight for site in results}
            folded = {n: tensors[n] for row in transforms for n in row.pop("folded") if n not in quantized}
            added = self._cache_scales(block, groups, before, tensors)
            names, changed = (*block.tensors, *added), self._as_stored(folded) | added
            notes = self.source.notes + starved_note(groups, stats, self._least)
            self.output.write(unit, names, results, changed, transforms, notes)
        del tensors, before, stats, results
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
        if not self.plan.recipe.group_transforms:
            return stats, []
        from outlierq.pipeline.folding import transform_group

        steps = [(method("transform", t.method), t.options) for t in self.plan.recipe.group_transforms]
        least = least_tokens(self.plan.recipe.calibration, frozenset())
        before, done, rows = dict(tensors), dict(stats), []
        for group in groups:
            schemes = [self.schemes[s] for s in group.sites if s in self.schemes]
            if schemes and group.routed and tokens_of(group, stats) < least:
                note = f"{STARVED} got {tokens_of(group, stats)} of the {least} tokens that a scale needs"
                row = {"group": group.name, "method": "", "note": note, "fold": None, "folded": []}
                rows.append({"block": block.index, **row})
            elif schemes and group.name in stats:
                narrowest = min(schemes, key=lambda scheme: scheme.bits)
                move, row = transform_group(group, stats[group.name], narrowest, tensors, steps, self.plan.checkpoint)
                for each in (group, *group.parts) if move else ():
                    done |= {each.name: stats[each.name].moved(move)} if each.name in stats else {}
                rows.append({"block": block.index, **row})
        self.source.check_transformed(block.index, before, tensors)
        return done, rows

    def _gather(
        self, block: Block, groups: list[InputGroup], stats: dict[str, InputStats], tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, InputStats], list[dict[str, Any]]]:
        """Bring outlier channels to the end of the inputs whose order is free; `tensors` get the new values."""
        rows: list[dict[str, Any]] = []
        for step in self.plan.recipe.permutations:
            from outlierq.pipeline.gathering import gather

            config = self.plan.skeleton.config.get_text_config()
            heads = getattr(config, "num_attention_heads", None)
            head_dim = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)

            def check(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
                self.source.check_transformed(block.index, before, after)

            chosen = method("permute", step.method), step.options
            stats, found = gather(block, groups, stats, tensors, chosen, head_dim, check)
            rows += found
        return stats, rows

    def _quantize(
        self, groups: list[InputGroup], stats: Mapping[str, InputStats], tensors: Mapping[str, torch.Tensor]
    ) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """Quantize every group of the block."""
        chosen = self.plan.recipe.quantize
        if chosen is None:
            return {}
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        usual, least = method("quantize", chosen.method), self._least
        for group in groups:
            for share in shares(group, stats, least):
                check_static(share, self.schemes)
                by, options = (method("quantize", "rtn"), UNKNOWN_INPUT) if share.rounded else (usual, chosen.options)
                done = quantize_group(
                    {s: as_matrix(s, tensors[s.weight]) for s in share.sites},
                    self.schemes,
                    share.stats,
                    by,
                    options,
                    clip_search=self.plan.recipe.clip_search_for(share.sites[0].module),
                )
                results |= {site: noted(found, share.note(least)) for site, found in done.items()}
        errors = [row.output_error for _, row in results.values() if row.output_error is not None]
        self.error = sum(errors) / len(errors) if errors else None
        return results

    def _cache_scales(
        self,
        block: Block,
        groups: list[InputGroup],
        before: Mapping[str, torch.Tensor],
        after: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The scales of the block's KV cache by tensor name, when the plan has some."""
        cache, chosen = self.plan.caches.get(block.index), self.plan.recipe.kv_cache
        if cache is None:
            return {}
        from outlierq.load.shards import torch_dtype
        from outlierq.pipeline.cache import cache_tensors

        dtype = torch_dtype(self.plan.layout.places[cache.names[0]].tensor.dtype)
        stats = self.source.block_stats(block.index)
        return cache_tensors(cache, chosen.scheme, stats, groups, before, after, dtype)

    def _round(self, site: LinearSite) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """A linear outside of the blocks has no statistics: round it to nearest, and say so."""
        weight = as_matrix(site, self.plan.checkpoint.read(site.weight).to(self.device))
        options = {} if not self.plan.recipe.needs else UNKNOWN_INPUT
        done = quantize_group({site: weight}, self.schemes, None, method("quantize", "rtn"), options)
        quantized, row = done[site]
        return {site: (quantized, replace(row, note="outside of the blocks: rounded to nearest, no statistics"))}


def noted(found: tuple[QuantTensor, SiteRow], text: str) -> tuple[QuantTensor, SiteRow]:
    """A result with one more note in its row; empty ones are left out."""
    quantized, row = found
    return quantized, replace(row, note="; ".join(part for part in (text, row.note) if part))


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
        if recipe.permutations:
            raise RecipeError(
                f"{recipe.permutations[0].method} tries its permutations on the model, which --stats does not run",
                hint="leave --stats out",
            )
        if recipe.rewrites:
            raise RecipeError(
                f"{recipe.rewrites[0].method} rewrites the whole model; the statistics in {stats} are of another one",
                hint="leave --stats out: the run then calibrates the rewritten model itself. For several recipes on "
                "one rewritten model, write it first (no `quantize` section, export.format: dense) and calibrate that",
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


def make_report(
    plan: Plan,
    out: Path,
    journal: Journal,
    clock: Clock,
    device: str,
    source: StatsSource,
    rewrite_error: float | None,
) -> Report:
    """Everything that was done, from the journal (so that a resumed run reports all of its blocks)."""
    rows = journal.rows
    transforms = tuple(row for entry in journal.entries.values() for row in entry["transforms"])
    noted = [note for entry in journal.entries.values() for note in entry["notes"]]
    # What is said of a starved expert's linears is said once for the block, too.
    noted += [f"{row.site}: {row.note}" for row in rows if row.note and not row.note.startswith(STARVED)]
    if rewrite_error is not None:
        noted.append(f"the rewritten model's float32 logits differ by {rewrite_error:.1e} from the original's")
    return Report(
        model=plan.checkpoint.source,
        recipe=plan.recipe.name,
        settings=plan.recipe.model_dump(mode="json"),
        out=str(out),
        fingerprint=original_of(plan.checkpoint).fingerprint,
        versions={"outlierq": __version__, "python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        seeds=({} if source.seed is None else {"calibration": source.seed})
        | {step.method: step.options.get("seed", 0) for step in plan.recipe.rewrites},
        machine=_machine(device),
        rows=rows,
        transforms=transforms,
        notes=(*plan.notes, *([source.remark] if source.remark else []), *noted),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        quantized_bits_per_weight=plan.quantized_bits_per_weight,
        source_bits_per_weight=8 * plan.source_bytes / plan.parameters,
        seconds=dict(journal.seconds + clock.seconds),
        peak_bytes=peak_bytes(),
    )


def _machine(device: str) -> dict[str, Any]:
    """What the run used."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "system": platform.system()}
