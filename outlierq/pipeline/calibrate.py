"""`outlierq calibrate`: run the model once, write its statistics; any number of recipes run from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outlierq.calibrate.collect import ALL_FIELDS, BLOCK_FIELDS
from outlierq.calibrate.stats_file import StatsIdentity, StatsWriter
from outlierq.core.errors import during
from outlierq.core.model import Block, Checkpoint
from outlierq.load import check_unchanged
from outlierq.pipeline.calibration import SAVED, StatsFromRun, forget_hidden_beyond, token_set
from outlierq.pipeline.events import Event, Listener, return_freed_memory, silent
from outlierq.pipeline.journal import locked
from outlierq.recipe import Calibration


def calibrate(
    checkpoint: Checkpoint,
    settings: Calibration,
    out: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    listen: Listener = silent,
) -> StatsIdentity:
    """Write all statistics to the folder `out`, block by block, and then final logits; a stopped run continues."""
    from outlierq.load import build_skeleton, checkpoint_names, find_structure

    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    structure = find_structure(checkpoint, skeleton)
    tokens = token_set(checkpoint, settings)
    identity = StatsIdentity(
        model_fingerprint=checkpoint.fingerprint,
        token_fingerprint=tokens.fingerprint,
        token_description=tokens.description,
        settings={
            "fields": sorted(ALL_FIELDS | BLOCK_FIELDS),
            "skip_first_tokens": settings.skip_first_tokens,
            "batch_size": settings.batch_size,
            "dtype": checkpoint.dtype,
            "seed": settings.seed,
            **({"all_experts": True} if settings.all_experts else {}),
        },
        mode="static",
    )
    names = checkpoint_names(checkpoint, skeleton)
    with locked(out):
        writer = StatsWriter(out, identity)
        source = StatsFromRun(
            skeleton,
            checkpoint,
            structure,
            names,
            tokens,
            settings,
            fields=ALL_FIELDS | BLOCK_FIELDS,
            work=out,
            device=device,
            listen=listen,
        )
        _write_missing(writer, source, structure.blocks, listen)
        (out / SAVED).unlink(missing_ok=True)
        writer.finish()
    return identity


def _write_missing(writer: StatsWriter, source: StatsFromRun, blocks: Sequence[Block], listen: Listener) -> None:
    """Run the model and write every block that is not there yet, and the logits."""
    missing = [block.index for block in blocks if block.index not in writer.done]
    if missing or not writer.logits:
        forget_hidden_beyond(source.work, min(missing, default=len(blocks)))
        for block in blocks:
            listen(Event("calibrate", block.index, len(blocks), block.name))
            if block.index in writer.done:
                source.replay(block.index, dict)
                continue
            with during("calibrate", block.name):
                groups, stats = source.block(block.index)
            check_unchanged(source.checkpoint)
            writer.write(block.index, groups, stats, source.block_stats(block.index), source.notes)
            source.finished(block.index, dict)
            return_freed_memory()
        if not writer.logits:
            with during("calibrate", "logits"):
                sample = source.logits()
            check_unchanged(source.checkpoint)
            writer.write_logits(sample)
    listen(Event("calibrate", len(blocks), len(blocks)))
