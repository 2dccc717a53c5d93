"""`outlierq calibrate`: run the model once, write its statistics; any number of recipes run from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.collect import ALL_FIELDS
from outlierq.calibrate.stored.stats_file import StatsIdentity, StatsReader, StatsWriter, former_shards
from outlierq.core.errors import OutputError, during
from outlierq.core.machine.heap import return_freed_memory, return_memory_at_once
from outlierq.core.measured.block_stats import BLOCK_FIELDS
from outlierq.core.model import Block, Checkpoint, StudiedModel
from outlierq.load import check_recorded, check_unchanged, differing, lasting_stamps, tokenizer_digest
from outlierq.pipeline.asked.events import Event, Listener, fetching
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.hidden_files import forget_hidden_beyond, saved_hidden
from outlierq.pipeline.block.imatrix import imatrix_from
from outlierq.pipeline.block.stats_run import Asked, StatsFromRun, in_shards, token_set
from outlierq.pipeline.ledger.folder import locked
from outlierq.pipeline.planning.memory import obeying
from outlierq.pipeline.planning.phases import Phases
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings, work_of_calibration
from outlierq.pipeline.processes.ranks import ALONE
from outlierq.pipeline.remodel.rewrite import check_source
from outlierq.recipe import Calibration

if TYPE_CHECKING:
    from outlierq.calibrate.text.windows import TokenSet


@dataclass(frozen=True)
class StoredStatistics:
    """A complete folder of statistics. identity: what they belong to. notes: what was unusual in making them."""

    folder: Path
    identity: StatsIdentity
    nbytes: int
    notes: tuple[str, ...]

    @property
    def description(self) -> str:
        """The tokens that the model read, in words."""
        return self.identity.token_description

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        stored = {"stats": str(self.folder), "bytes": self.nbytes, "notes": list(self.notes)}
        return stored | self.identity.to_json()


@dataclass(frozen=True)
class Kept:
    """What is kept. only: fields (None: all). sensitivity: also what an error of each linear costs at the end of the
    model. told: is given about how many bytes that will be, before work.
    """

    only: frozenset[str] | None = None
    sensitivity: bool = False
    told: Callable[[int], Any] = lambda nbytes: None


EVERYTHING = Kept()


def make_statistics(
    source: Source,
    settings: Calibration,
    out: Path,
    kept: Kept = EVERYTHING,
    *,
    imatrix: Path | None = None,
    resources: Resources = USUAL,
) -> StoredStatistics:
    """Calibrate a model as a user names it; all processes that share the work are told what was stored.

    imatrix: a file that gets the statistics as llama.cpp has them.
    """
    with source.opened_for(out) as checkpoint:
        resources.ranks.first(lambda: check_recorded(checkpoint))
        identity = calibrate(checkpoint, settings, out, **vars(kept), resources=resources)
        if resources.ranks.lead:
            checkpoint.drop_shards()
            if imatrix is not None:
                imatrix_from(out, checkpoint.config, imatrix)
    return resources.ranks.first(lambda: _stored(out, identity))


def _stored(folder: Path, identity: StatsIdentity) -> StoredStatistics:
    """What lies in the folder."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    return StoredStatistics(folder, identity, size, tuple(StatsReader(folder).notes))


def calibrate(
    checkpoint: Checkpoint,
    settings: Calibration,
    out: Path,
    *,
    only: frozenset[str] | None = None,
    sensitivity: bool = False,
    told: Callable[[int], Any] = lambda nbytes: None,
    resources: Resources = USUAL,
) -> StatsIdentity:
    """Write all statistics to the folder `out`, block by block, and then final logits; a stopped run continues.

    only: fields of `InputStats` and `BlockStats` to keep, and no logits. sensitivity: that, too, also to finished
    statistics that lack it. told: is given about how many bytes there will be.
    """
    from outlierq.load import served, study

    checkpoint = served(checkpoint)
    ranks, listen = resources.ranks, resources.listen
    ranks.use(resources.device)
    fields = ALL_FIELDS | BLOCK_FIELDS if only is None else only
    return_memory_at_once()  # each part has weights for a moment, and a deep model would leave the heap full of holes
    model = study(checkpoint)
    structure = model.structure
    checkpoint.make_room(structure, fetching(listen), together=False)
    former = ranks.first(lambda: former_shards(out))
    work = work_of_calibration(model, settings, fields, resources, shards=former)
    savings = obeying(work, resources)
    told(len(structure.blocks) * Phases(work, NO_SAVINGS).statistics())
    tokens = ranks.first(lambda: token_set(model, settings, out, resources))
    settings, _ = in_shards(settings, len(tokens.ids), ranks, former)
    identity = _identity(checkpoint, tokens, settings, fields, savings)
    ranks.first(lambda: check_source(checkpoint, listen))
    with locked(out) if ranks.lead else nullcontext():
        writer = _writer(out, identity, checkpoint, settings) if ranks.lead else None

        def written() -> Written:
            assert writer is not None, "only the lead is asked"
            return Written(writer.done, only is not None or writer.logits is not None)

        done = ranks.first(written)
        source = StatsFromRun(model, tokens, settings, out, resources, savings, Asked(fields))
        _make_missing(done, writer, source, structure.blocks, listen)
        if sensitivity:
            ranks.at = "what errors cost"
            ranks.first(lambda: _add_sensitivity(writer, model, tokens, settings, resources))
        if writer is not None:
            for path in saved_hidden(out):
                path.unlink()
            writer.finish()
    return identity


def _add_sensitivity(
    writer: StatsWriter | None, model: StudiedModel, tokens: TokenSet, settings: Calibration, resources: Resources
) -> None:
    """Write what errors cost, unless it is there; the lead does it alone."""
    assert writer is not None, "only the lead is asked"
    if writer.sensitivity is not None:
        return
    alone = replace(resources, ranks=ALONE)
    measured = StatsFromRun(model, tokens, one_by_one(settings), writer.folder, alone).sensitivity()
    check_unchanged(model.checkpoint)
    writer.write_sensitivity(measured, model.checkpoint.bytes_read)


def one_by_one(settings: Calibration) -> Calibration:
    """The settings of a pass with gradients: only the graph of one sequence is held beside a block."""
    return settings.model_copy(update={"batch_size": 1, "shards": 1})


def _identity(
    checkpoint: Checkpoint, tokens: TokenSet, settings: Calibration, fields: frozenset[str], savings: Savings
) -> StatsIdentity:
    """What the statistics belong to: a run continues only with the same."""
    return StatsIdentity(
        model_fingerprint=checkpoint.fingerprint,
        token_fingerprint=tokens.fingerprint,
        token_description=tokens.summary,
        settings={
            "fields": sorted(fields),
            "skip_first_tokens": settings.skip_first_tokens,
            "batch_size": savings.batch_size or settings.batch_size,
            "dtype": checkpoint.dtype,
            "seed": settings.seed,
            **({"unseen_tokens": True} if tokens.unseen is not None else {}),
            **({"all_experts": True} if settings.all_experts else {}),
            **({"shards": settings.shards} if (settings.shards or 1) > 1 else {}),
        },
        mode="static",
        tokenizer=tokenizer_digest(checkpoint),
    )


def _writer(out: Path, identity: StatsIdentity, checkpoint: Checkpoint, settings: Calibration) -> StatsWriter:
    """Writes statistics, or goes on with them. OutputError when the blocks that there are were made of other bytes."""
    writer = StatsWriter(out, identity, lasting_stamps(checkpoint), settings.model_dump(mode="json"))
    changed = differing(checkpoint, writer.read) if writer.former_stamps not in (None, writer.stamps) else []
    if changed:
        raise OutputError(
            f"{out} holds statistics of other weights: {changed[0]} of {checkpoint.source} had other bytes",
            hint="give another folder, or delete this one",
        )
    return writer


@dataclass(frozen=True)
class Written:
    """What an earlier run has written: indices of blocks, and whether the logits are there or not wanted."""

    blocks: frozenset[int]
    logits: bool


def _make_missing(
    done: Written, writer: StatsWriter | None, source: StatsFromRun, blocks: Sequence[Block], listen: Listener
) -> None:
    """Run the model and write every block that is not there yet, and the logits. writer: of the lead."""
    missing = [block.index for block in blocks if block.index not in done.blocks]
    if missing or not done.logits:
        if writer:
            forget_hidden_beyond(source.work, min(missing, default=len(blocks)))
        for block in blocks:
            source.ranks.at = block.name
            listen(Event("calibrate", block.index, len(blocks), block.name))
            if block.index in done.blocks:
                source.replay(block.index, dict)
                continue
            with during("calibrate", block.name):
                groups, stats = source.block(block.index)
            check_unchanged(source.checkpoint)
            if writer:
                made = source.block_stats(block.index), source.notes, source.checkpoint.bytes_read
                writer.write(block.index, groups, stats, *made)
            source.finished(block.index, dict)
            return_freed_memory()
        if not done.logits:
            source.ranks.at = "the logits"
            listen(Event("calibrate", len(blocks), len(blocks), step="final logits"))
            with during("calibrate", "logits"):
                sample = source.logits()
            check_unchanged(source.checkpoint)
            if writer and sample is not None:
                writer.write_logits(sample, source.checkpoint.bytes_read)
    listen(Event("calibrate", len(blocks), len(blocks)))
