"""Recipes without statistics: no block waits for another, so threads work side by side, each on a block of its own.

Tensor operations, reading, writing and digests let other Python threads run, so threads are enough. A linear is read,
rounded, written and read back before the next one begins: memory holds one linear per thread, and most of its bytes
are still in the cache when they are read back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import OutputError, during
from outlierq.core.machine.heap import keep_freed_memory
from outlierq.core.machine.threads import one_thread_each, pool, single_threaded
from outlierq.core.model import Checkpoint, LinearSite, as_matrix
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import SiteRow
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.asked.resources import Resources
from outlierq.pipeline.block.taken_over import taken_over
from outlierq.pipeline.ledger.journal import JOURNAL
from outlierq.pipeline.ledger.output import Digests, Output
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.processes.ranks import Ranks
from outlierq.quantize.stage import QuantizedRows, quantize_rows, rows_of_a_piece
from outlierq.registry import method

if TYPE_CHECKING:
    import torch

# More threads would only wait for the disk, and each holds a linear in memory.
MOST_THREADS = 8


@dataclass(frozen=True)
class Unit:
    """A unit of work. where: its name in errors. linears: what quantizes each of those that are."""

    name: str
    where: str
    tensors: tuple[str, ...]
    linears: Mapping[LinearSite, Callable[[LinearSite], QuantizedRows]]


@dataclass(frozen=True)
class Done:
    """A unit that is written and read back, but not yet forced onto the disk. seconds: by stage, of one thread.

    read: digests of the source's tensors that another process has read.
    """

    name: str
    digests: Digests
    rows: list[SiteRow]
    seconds: dict[str, float]
    read: dict[str, str] = field(default_factory=dict)


def is_data_free(plan: Plan) -> bool:
    """Whether nothing in the recipe looks at data or at more than one tensor."""
    return not plan.recipe.needs and not plan.recipe.transform


def done_by_all(units: list[Unit], output: Output, resources: Resources) -> Generator[Done, None, None]:
    """The units, dealt to the ranks in turn, in their order as they are done; the others `give` theirs."""
    ranks = resources.ranks
    with closing(done_in_order(units[:: ranks.size], output, resources.device)) as ours:
        for number in range(len(units)):
            rank = number % ranks.size
            yield next(ours) if rank == 0 else ranks.receive(rank)


def give(units: list[Unit], output: Output, resources: Resources) -> None:
    """Do this rank's units and tell the lead of each, once what was written is forced onto the disk."""
    ranks = resources.ranks
    with closing(done_in_order(units[ranks.rank :: ranks.size], output, resources.device)) as ours:
        for done in ours:
            output.writer.sync()
            ranks.send(replace(done, read=output.newly_read()), 0)


def output_beside(plan: Plan, work: Path, ranks: Ranks) -> Output:
    """The lead's files, open for another rank. OutputError when they are not seen from here."""
    if not (work / JOURNAL).is_file():
        raise OutputError(
            f"rank {ranks.rank} of {ranks.size} does not see {work}, into which it has to write",
            hint="give an output folder that all machines share; a recipe that calibrates needs none",
        )
    return Output(plan, work, None)


def done_in_order(units: list[Unit], output: Output, device: str) -> Generator[Done, None, None]:
    """Work on several units at once and give them in their order; the first error ends the work on all.

    Close the generator before `output` is closed: it waits for its threads.
    """
    keep_freed_memory()
    with one_thread_each() as count:
        # A GPU has work for one thread only.
        most = output.plan.checkpoint.most_threads or MOST_THREADS
        workers = min(count, most, MOST_THREADS) if device == "cpu" else 1
        threads = pool(workers, "block", single_threaded)
        try:
            waiting = [threads.submit(_write, unit, output) for unit in units]
            yield from _results(waiting)
        finally:
            threads.shutdown(cancel_futures=True)


def _results(waiting: list[Future[Done]]) -> Iterator[Done]:
    """The results in order, each forgotten when it is given."""
    while waiting:
        yield waiting.pop(0).result()


def _write(unit: Unit, output: Output) -> Done:
    """Round, write and read back everything in a unit."""
    linears = {site.weight: site for site in unit.linears}
    digests: Digests = {}
    rows: dict[LinearSite, SiteRow] = {}
    seconds = {"quantize": 0.0, "export": 0.0}
    for name in unit.tensors:
        started, before = time.perf_counter(), seconds["quantize"]
        with during("export", unit.where):
            if name in linears:
                site = linears[name]
                with during("quantize", site.module):
                    quantized = unit.linears[site](site)
                digests |= output.put_linear(site, _timed(quantized, site, seconds))
                rows[site] = quantized.row
            else:
                digests |= output.copy(name)
        seconds["export"] += time.perf_counter() - started - (seconds["quantize"] - before)
    return Done(unit.name, digests, [rows[site] for site in unit.linears], seconds)


def _timed(quantized: QuantizedRows, site: LinearSite, seconds: dict[str, float]) -> Iterator[QuantTensor]:
    """The pieces, when they are asked for; their seconds and errors are those of quantizing."""
    pieces = iter(quantized)
    while True:
        started = time.perf_counter()
        with during("quantize", site.module):
            piece = next(pieces, None)
        seconds["quantize"] += time.perf_counter() - started
        if piece is None:
            return
        yield piece


def rounder(plan: Plan, device: str) -> Callable[[LinearSite], QuantizedRows]:
    """The recipe's method on one linear, read and quantized piece by piece."""
    section, schemes = plan.recipe.quantize, plan.schemes

    def quantized(site: LinearSite) -> QuantizedRows:
        assert section is not None, "the recipe rounds nothing"
        if site in plan.taken_over:
            return QuantizedRows.whole(*taken_over(plan.checkpoint, site))
        pieces = (piece.to(device) for piece in _pieces(plan.checkpoint, site, schemes[site]))
        return quantize_rows(site, pieces, schemes[site], method("quantize", section.method), section.options)

    return quantized


def _pieces(checkpoint: Checkpoint, site: LinearSite, scheme: QuantScheme) -> Iterator[torch.Tensor]:
    """Rows of the [out, in] weight; one that is stored [in, out] is read whole."""
    count = rows_of_a_piece(site.in_features, scheme)
    if site.transposed:
        return iter(as_matrix(site, checkpoint.read(site.weight)).split(count))
    return checkpoint.read_rows(site.weight, count)
