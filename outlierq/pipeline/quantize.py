"""The main job: load -> calibrate -> transform -> quantize -> export, one block at a time, resumable and verified."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq import __version__
from outlierq.calibrate.stored.spilled import each_changed
from outlierq.core.errors import RecipeError, during
from outlierq.core.machine.heap import return_freed_memory, return_memory_at_once
from outlierq.core.machine.record import signed
from outlierq.core.model import Block, InputGroup, LinearSite, as_matrix, largest
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import REPORT_NAME, Report, SiteRow
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.export.writer import write_small
from outlierq.load import lasting_stamps
from outlierq.pipeline.asked.events import Event, fetching
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.data_free import Unit, done_by_all, give, is_data_free, output_beside, rounder
from outlierq.pipeline.block.hidden_files import forget_hidden_beyond, hidden_names
from outlierq.pipeline.block.report import make_report
from outlierq.pipeline.block.sources import owners_for, stats_source
from outlierq.pipeline.block.starved import (
    STARVED,
    check_static,
    in_order_of_shares,
    least_tokens,
    shares,
    starved_note,
    tokens_of,
)
from outlierq.pipeline.block.stats import StatsSource
from outlierq.pipeline.block.taken_over import taken_from, taken_over
from outlierq.pipeline.checking.written import check_written
from outlierq.pipeline.ledger.clock import Clock
from outlierq.pipeline.ledger.folder import finish, work_folder, working
from outlierq.pipeline.ledger.journal import Journal, former_shards
from outlierq.pipeline.ledger.output import Output
from outlierq.pipeline.planning.memory import LARGE, obeying
from outlierq.pipeline.planning.plan import OUTSIDE, Plan, unit_name
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings, work_of
from outlierq.pipeline.processes.ranks import Ranks
from outlierq.pipeline.processes.sharding import bare, names_of
from outlierq.pipeline.remodel.rewrite import check_source, kept_experts, prove_rewrite
from outlierq.quantize.stage import QuantizedRows, quantize_group
from outlierq.registry import method

if TYPE_CHECKING:
    import torch

# Options of rounding to nearest for a linear whose input is not known, in a recipe that looks at inputs.
UNKNOWN_INPUT = {"scale_search": "mse"}


def quantize(
    plan: Plan,
    out: Path,
    *,
    stats: Path | None = None,
    restart: bool = False,
    resources: Resources = USUAL,
) -> Report:
    """Carry out a plan and put the result at `out`; the report is also written there as outlierq.json.

    stats: a folder of `outlierq calibrate` to use instead of running the model. An interrupted run continues.
    All processes that share the work get the lead's report.
    """
    if plan.recipe.quantize is not None and plan.recipe.quantize.keep_share is not None:
        raise RecipeError(
            "quantize.keep_share is decided by a calibration before the plan, which only `outlierq quantize` makes",
            hint="use that, or --set quantize.keep_share=null",
        )
    ranks, listen = resources.ranks, resources.listen
    former = ranks.first(lambda: None if restart else former_shards(work_folder(out)))
    savings = obeying(work_of(plan, resources, stats=stats is not None, shards=former), resources)
    ranks.use(resources.device)
    plan.checkpoint.make_room(plan.structure, fetching(listen), together=is_data_free(plan))
    ranks.first(lambda: check_source(plan.checkpoint, listen))
    with _working_together(out, restart, ranks) as work:
        clock = Clock()
        with clock("calibrate"):
            source = stats_source(plan, work, stats, resources, savings, former)
        with during("transform", "the whole model"), clock("transform"):
            rewrite_error = ranks.first(lambda: prove_rewrite(plan.model, listen))
        if not ranks.lead:
            _Run(plan, source, work, None, clock, resources, savings).all()
            return ranks.first(_of_the_lead)
        identity = _identity(plan, source, savings)
        files = plan.files | hidden_names(identity.get("shards", 1))
        journal = Journal(work, identity, clock.spent, _about(plan), files, lasting_stamps(plan.checkpoint))
        journal.check_source(plan.checkpoint)
        with journal.told_of_stops(), closing(Output(plan, work, journal)) as output:
            output.made_of |= source.made_of
            _Run(plan, source, work, output, clock, resources, savings).all()
            with clock("verify"):
                blocks = len(plan.structure.blocks)
                listen(Event("quantize", blocks, blocks, step="verifying"))
                write_small(work, plan.small_files)
                output.verify()
                check_written(work, plan.checkpoint)
                record = {"run": identity, **output.record(), **kept_experts(plan.checkpoint)}
        report = make_report(plan, out, journal, clock, source, rewrite_error, resources)
        report = signed(replace(report, notes=(*report.notes, *savings.sentences)), record)
        write_small(work, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        plan.checkpoint.drop_shards()
        finish(work, out, plan.files)
    if resources.max_memory is None:
        return_memory_at_once(LARGE)  # this process may go on, with a gate for example
    return_freed_memory()
    return ranks.first(lambda: report)


def _of_the_lead() -> Report:
    """Stands for the report that the lead makes; the other ranks only say that they wait for it."""
    raise AssertionError("only the lead is asked")


@contextmanager
def _working_together(out: Path, restart: bool, ranks: Ranks) -> Iterator[Path]:
    """The work folder, which the lead makes and locks; the others go on when it is there."""
    if ranks.lead:
        with working(out, restart=restart) as work:
            ranks.first(lambda: None)
            yield work
    else:
        ranks.first(lambda: None)
        yield work_folder(out)


class _Run:
    """The units of one plan, one after another.

    work: the work folder. output: of the lead; other ranks have none, and give what they make to the lead.
    """

    def __init__(
        self,
        plan: Plan,
        source: StatsSource,
        work: Path,
        output: Output | None,
        clock: Clock,
        resources: Resources = USUAL,
        savings: Savings = NO_SAVINGS,
    ):
        self.savings, self.resources = savings, resources
        self.plan, self.source, self.work, self.output = plan, source, work, output
        self.clock, self.device, self.listen, self.ranks = clock, resources.device, resources.listen, resources.ranks
        self.schemes = plan.schemes
        self._rounded = {site: scheme for site, scheme in plan.schemes.items() if site not in plan.taken_over}
        calibration = plan.recipe.calibration
        self.sink_weight = calibration.sink_weight if calibration else 1.0
        self.error: float | None = None
        rounding = plan.recipe.quantize
        self._least = least_tokens(calibration, method("quantize", rounding.method).needs if rounding else frozenset())
        self._done: frozenset[str] = frozenset()

    @property
    def _written_to(self) -> Output:
        """The output, which only the lead has."""
        assert self.output is not None, "only the lead writes into the journal"
        return self.output

    def all(self) -> None:
        """Everything that an earlier run has not done."""
        self._done = self.ranks.first(lambda: frozenset(self._written_to.entries))
        self._data_free() if is_data_free(self.plan) else self._in_order()

    def _data_free(self) -> None:
        """All units, several at once, dealt to the ranks in turn; each goes into the journal in its turn."""
        blocks = self.plan.structure.blocks
        rounded = rounder(self.plan, self.device)
        # Only types of GGUF: what other recipes have written there stays as it was.
        outside = {s: rounded if self.schemes[s].type else self._whole for s in self._outside_sites()}
        units = [Unit(OUTSIDE, "what is outside of the blocks", self._outside_names(), outside)]
        for block in blocks:
            linears = {site: rounded for site in block.sites if site in self.schemes}
            units.append(Unit(unit_name(block.index), block.name, block.tensors, linears))
        places = {unit_name(block.index): block for block in blocks}
        waiting = [unit for unit in units if unit.name not in self._done]
        if not self.ranks.lead:
            with closing(output_beside(self.plan, self.work, self.ranks)) as output:
                give(waiting, output, self.resources)
            return
        since = time.perf_counter()
        # Closed before the output is: no thread may write to a file that is closed.
        with closing(done_by_all(waiting, self._written_to, self.resources)) as results:
            for done in results:
                if done.name in places:
                    block = places[done.name]
                    self.listen(Event("quantize", block.index, len(blocks), block.name))
                now = time.perf_counter()
                self.clock.share(now - since, done.seconds)
                since = now
                self._written_to.commit(done.name, done.digests, done.rows, read=done.read)

    def _in_order(self) -> None:
        """All units, one after another: each block may see what was made of those before it."""
        if self.ranks.lead:
            forget_hidden_beyond(self.work, self._first_missing())
            self.outside()
        for block in self.plan.structure.blocks:
            self.ranks.at = block.name
            self.block(block)

    def _first_missing(self) -> int:
        """Index of the first block that is not done."""
        blocks = self.plan.structure.blocks
        return next((block.index for block in blocks if unit_name(block.index) not in self._done), len(blocks))

    def _outside_sites(self) -> list[LinearSite]:
        """Linears outside of the blocks that are quantized."""
        return [site for site in self.plan.structure.outside_sites if site in self.schemes]

    def _outside_names(self) -> tuple[str, ...]:
        """Every tensor outside of the blocks."""
        structure = self.plan.structure
        of_sites = (name for site in structure.outside_sites for name in (site.weight, site.bias))
        return structure.outside_once + tuple(name for name in of_sites if name is not None)

    def outside(self) -> None:
        """Write what lies outside of the blocks; linears there are rounded without statistics when they are asked."""
        if OUTSIDE in self._done:
            return
        self.listen(Event("quantize", 0, len(self.plan.structure.blocks), step="what is outside of the blocks"))
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        for site in self._outside_sites():
            results |= self._round(site)
        with self.clock("export"):
            self._written_to.write(OUTSIDE, self._outside_names(), results)

    def block(self, block: Block) -> None:
        """Calibrate, transform, quantize, write and verify one block, or carry on past a finished one."""
        self._tell(block)
        unit = unit_name(block.index)
        if unit in self._done:
            with self.clock("calibrate"):
                self.source.replay(block.index, lambda: self._written(block))
            return
        with during("calibrate", block.name), self.clock("calibrate"):
            groups, stats = self.source.block(block.index)
            owners = owners_for(self.plan)(groups, self.ranks)
            mine = {name for name, rank in owners.items() if rank == self.ranks.rank}
            stats = each_changed(stats, bare, [name for name in stats if name not in mine])
            stats = each_changed(stats, lambda each: each.weigh_sinks(self.sink_weight))
        return_freed_memory()
        before = tensors = self._tensors(block)
        transforms: list[dict[str, Any]] = []
        with during("transform", block.name), self.clock("transform"):
            self._tell(block, "transform")
            if self._changes_weights:
                tensors = dict(before)
                stats, transforms = self._transform(block, groups, mine, stats, tensors)
                if self.ranks.lead:
                    stats, moved = self._gather(block, groups, stats, tensors)
                    transforms += moved
        with self.clock("quantize"):
            results = self._quantize(block, groups, mine, stats, tensors)
            results, said = self._learn(block, groups, stats, tensors, results)
        if self.ranks.lead:
            self._tell(block, "writing")
            with during("export", block.name), self.clock("export"):
                quantized = {site.weight for site in results}
                folded = {n: tensors[n] for row in transforms for n in row.pop("folded") if n not in quantized}
                added = self._cache_scales(block, groups, before, tensors)
                names, changed = (*block.tensors, *added), self._as_stored(folded) | added
                notes = self.source.notes + said + starved_note(groups, stats, self._least)
                self._written_to.write(unit, names, results, changed, transforms, notes)
        del tensors, before, stats, results
        with self.clock("calibrate"):
            self.source.finished(block.index, lambda: self._written(block))
        return_freed_memory()

    def _tell(self, block: Block, step: str = "", share: float = 0.0) -> None:
        """Tell the listener what is being done for a block. share: of its rounding that is done."""
        total = len(self.plan.structure.blocks)
        self.listen(Event("quantize", block.index, total, block.name, self.error, step=step, share=share))

    def _written(self, block: Block) -> dict[str, torch.Tensor]:
        """The dense tensors of a block as they lie on disk; only the lead reads what only the lead has written."""
        return self.ranks.first(lambda: self._written_to.written(block))

    @property
    def _changes_weights(self) -> bool:
        """Whether weights are changed before they are rounded."""
        return bool(self.plan.recipe.group_transforms or self.plan.recipe.permutations)

    def _tensors(self, block: Block) -> Mapping[str, torch.Tensor]:
        """The block's tensors on the device, as stored; each read when it is asked for where nothing changes them."""
        return self._read(block.tensors) if self._changes_weights else Unread(self._read, block.tensors)

    def _read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors on the device, as stored."""
        return {name: t.to(self.device) for name, t in self.plan.checkpoint.read_many(names).items()}

    def _as_stored(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Folded tensors in the dtype that the plan gives them."""
        from outlierq.load.source.shards import torch_dtype

        infos = self.plan.checkpoint.tensors
        return {name: tensor.to(torch_dtype(infos[name].dtype)).cpu() for name, tensor in tensors.items()}

    def _transform(
        self,
        block: Block,
        groups: list[InputGroup],
        mine: Collection[str],
        stats: Mapping[str, InputStats],
        tensors: dict[str, torch.Tensor],
    ) -> tuple[Mapping[str, InputStats], list[dict[str, Any]]]:
        """Scale each group's input and fold the inverse into its producer; `tensors` get the new values.

        mine: the groups whose move this rank chooses; every rank then carries out all moves.
        """
        if not self.plan.recipe.group_transforms:
            return stats, []
        from outlierq.pipeline.block.fold import carry_out, choose, waves

        steps = [(method("transform", t.method), t.options) for t in self.plan.recipe.group_transforms]
        least = least_tokens(self.plan.recipe.calibration, frozenset())
        before = dict(tensors)
        rows: dict[str, dict[str, Any]] = {}
        moved = []
        for group in groups:
            if not any(site in self.schemes for site in group.sites):
                continue
            if group.routed and tokens_of(group, stats) < least:
                few = f"{STARVED} got {tokens_of(group, stats)} of the {least} tokens that a scale needs"
                note = few if group.sites[0].expert else group.fold_note
                rows[group.name] = {"group": group.name, "method": "", "note": note, "fold": None, "folded": []}
            elif group.name in stats:
                moved.append(group)
        for wave in waves(moved):
            choices = {
                group.name: choose(
                    group, stats[group.name], self._narrowest(group), tensors, steps, self.plan.checkpoint
                )
                for group in wave
                if group.name in mine
            }
            choices = {name: choice for made in self.ranks.share(choices) for name, choice in made.items()}
            for group in wave:
                choice = choices[group.name]
                rows[group.name] = carry_out(group, choice, tensors, steps)
                if choice:
                    ours = [name for name in names_of(group) if name in mine]
                    stats = each_changed(stats, partial(InputStats.moved, move=choice.move), ours)
        self.source.check_transformed(block.index, before, tensors)
        return stats, [{"block": block.index, **rows[group.name]} for group in groups if group.name in rows]

    def _narrowest(self, group: InputGroup) -> QuantScheme:
        """The scheme with the fewest bits among the group's sites."""
        return min((self.schemes[s] for s in group.sites if s in self.schemes), key=lambda scheme: scheme.bits)

    def _gather(
        self, block: Block, groups: list[InputGroup], stats: Mapping[str, InputStats], tensors: dict[str, torch.Tensor]
    ) -> tuple[Mapping[str, InputStats], list[dict[str, Any]]]:
        """Bring outlier channels to the end of the inputs whose order is free; `tensors` get the new values."""
        rows: list[dict[str, Any]] = []
        for permutation in self.plan.recipe.permutations:
            from outlierq.pipeline.block.gather import gather

            config = self.plan.model.skeleton.config.get_text_config()
            heads = largest(config, "num_attention_heads")
            head_dim = largest(config, "head_dim") or (heads and largest(config, "hidden_size") // heads)

            def check(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
                self.source.check_transformed(block.index, before, after)

            step = method("permute", permutation.method), permutation.options
            stats, moved = gather(block, groups, stats, tensors, step, head_dim, check)
            rows += moved
        return stats, rows

    def _quantize(
        self,
        block: Block,
        groups: list[InputGroup],
        mine: Collection[str],
        stats: Mapping[str, InputStats],
        tensors: Mapping[str, torch.Tensor],
    ) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """Quantize every group of the block, each rank its own; the lead gets all results."""
        if self.plan.recipe.quantize is None:
            return {}
        before = self._as_before(block)
        if before:
            return before if self.ranks.lead else {}
        own: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        for number, group in enumerate(groups):
            if any(name in mine for name in names_of(group)):
                linears = ", ".join(site.module.rpartition(".")[2] for site in group.sites[:3])
                self._tell(block, f"rounding {linears}", number / len(groups))
                own |= self._quantize_one(group, mine, stats, tensors)
                if self.plan.recipe.learn is None:
                    stats = each_changed(stats, bare, names_of(group))  # nobody reads their sums again
                return_freed_memory()
        everything = {site: result for made in self.ranks.gather(own) for site, result in made.items()}
        if not self.ranks.lead:
            return {}
        as_stored = [site for site in block.sites if site in self.plan.taken_over]
        everything |= {site: taken_over(self.plan.checkpoint, site) for site in as_stored}
        ordered = [site for group in groups for site in in_order_of_shares(group)]
        results = {site: everything[site] for site in ordered if site in everything}
        errors = [row.output_error for _, row in results.values() if row.output_error is not None]
        self.error = sum(errors) / len(errors) if errors else None
        return results

    def _as_before(self, block: Block) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """What an earlier result has of the block, where it has all of it."""
        sites = [site for site in block.sites if site in self.schemes]
        if block.index not in self.plan.alike or not self._rounded.keys() >= {*sites}:
            return {}
        return taken_from(self.plan.alike[block.index], {site: self.schemes[site] for site in sites})

    def _learn(
        self,
        block: Block,
        groups: list[InputGroup],
        stats: Mapping[str, InputStats],
        tensors: Mapping[str, torch.Tensor],
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]],
    ) -> tuple[dict[LinearSite, tuple[QuantTensor, SiteRow]], list[str]]:
        """Let the block learn as a whole, where the recipe asks for it; what it learned, and notes on it."""
        learn = self.plan.recipe.learn
        batches = [] if learn is None else self.source.batches_to_learn(block.index)
        rounded = {site: result for site, result in results.items() if site in self._rounded}
        if learn is None or not batches or not rounded:
            return results, []
        from outlierq.pipeline.block.learn import learned

        self._tell(block, f"learning by {learn.method}")
        known = {s: share.stats for group in groups for share in shares(group, stats, self._least) for s in share.sites}
        known_stats = {site: each for site, each in known.items() if each is not None}
        done, notes = learned(block, batches, tensors, rounded, known_stats, learn, self.sink_weight)
        return results | done, notes

    def _quantize_one(
        self,
        group: InputGroup,
        mine: Collection[str],
        stats: Mapping[str, InputStats],
        tensors: Mapping[str, torch.Tensor],
    ) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """Quantize those sites of one group whose statistics this rank has."""
        rounding = self.plan.recipe.quantize
        assert rounding is not None, "the recipe rounds nothing"
        results: dict[LinearSite, tuple[QuantTensor, SiteRow]] = {}
        usual, least = method("quantize", rounding.method), self._least
        for share in shares(group, stats, least):
            if share.name not in mine:
                continue
            check_static(share, self._rounded)
            by, options = (method("quantize", "rtn"), UNKNOWN_INPUT) if share.rounded else (usual, rounding.options)
            done = quantize_group(
                {s: as_matrix(s, tensors[s.weight]) for s in share.sites},
                self._rounded,
                share.stats,
                by,
                options,
                clip_search=self.plan.recipe.clip_search_for(share.sites[0].module),
                most_weights=self.savings.most_weights,
            )
            results |= {site: noted(result, share.note(least)) for site, result in done.items()}
        return results

    def _cache_scales(
        self,
        block: Block,
        groups: list[InputGroup],
        before: Mapping[str, torch.Tensor],
        after: Mapping[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """The scales of the block's KV cache by tensor name, when the plan has some."""
        cache, kv_cache = self.plan.caches.get(block.index), self.plan.recipe.stored_cache
        if cache is None or kv_cache is None:
            return {}
        from outlierq.load.source.shards import torch_dtype
        from outlierq.pipeline.block.kv_cache import cache_tensors

        dtype = torch_dtype(self.plan.layout.places[cache.names[0]].tensor.dtype)
        stats = self.source.block_stats(block.index)
        return cache_tensors(cache, kv_cache.scheme, stats, groups, before, after, dtype)

    def _round(self, site: LinearSite) -> dict[LinearSite, tuple[QuantTensor, SiteRow]]:
        """A linear outside of the blocks has no statistics: round it to nearest, and say so."""
        if site in self.plan.taken_over:
            return {site: taken_over(self.plan.checkpoint, site)}
        weight = as_matrix(site, self.plan.checkpoint.read(site.weight).to(self.device))
        options = {} if not self.plan.recipe.needs else UNKNOWN_INPUT
        done = quantize_group({site: weight}, self.schemes, None, method("quantize", "rtn"), options)
        quantized, row = done[site]
        note = "outside of the blocks: rounded to nearest, no statistics" if self.plan.recipe.needs else ""
        return {site: (quantized, replace(row, note=note))}

    def _whole(self, site: LinearSite) -> QuantizedRows:
        """The same in one piece."""
        return QuantizedRows.whole(*self._round(site)[site])


class Unread(Mapping[str, "torch.Tensor"]):
    """Tensors by name that are read when they are asked for, and not kept. read: gives some of them."""

    def __init__(self, read: Callable[[Sequence[str]], Mapping[str, torch.Tensor]], names: Sequence[str]):
        self._read, self._names = read, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read([name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def noted(result: tuple[QuantTensor, SiteRow], text: str) -> tuple[QuantTensor, SiteRow]:
    """A result with one more note in its row; empty ones are left out."""
    quantized, row = result
    return quantized, replace(row, note="; ".join(part for part in (text, row.note) if part))


def _identity(plan: Plan, source: StatsSource, savings: Savings) -> dict[str, Any]:
    """What must be equal for a run to be continued."""
    made_with = {"outlierq": __version__, "source": plan.checkpoint.fingerprint, "recipe": plan.recipe.fingerprint}
    code = {"methods": plan.recipe.outside_code} if plan.recipe.outside_code else {}
    return made_with | code | source.identity | savings.identity


def _about(plan: Plan) -> dict[str, Any]:
    """What a reader of an unfinished run wants to know."""
    commit = plan.checkpoint.revision
    values = {"model": plan.checkpoint.source, "commit": commit, "recipe": plan.recipe.name}
    return {**values, "units": len(plan.structure.blocks) + 1}
