"""`outlierq calibrate`: run the model once, write its statistics; any number of recipes run from them."""

from __future__ import annotations

from pathlib import Path

from outlierq.calibrate.collect import ALL_FIELDS
from outlierq.calibrate.stats_file import StatsIdentity, StatsWriter
from outlierq.core.model import Checkpoint
from outlierq.pipeline.calibration import StatsFromRun, token_set
from outlierq.pipeline.events import Event, Listener, return_freed_memory, silent
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
    """Write `InputStats` of every input group to the folder `out`, block by block; a stopped run continues."""
    from outlierq.load import build_skeleton, checkpoint_names, find_structure

    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    structure = find_structure(checkpoint, skeleton)
    tokens = token_set(checkpoint, settings)
    identity = StatsIdentity(
        model_fingerprint=checkpoint.fingerprint,
        token_fingerprint=tokens.fingerprint,
        token_description=tokens.description,
        settings={
            "fields": sorted(ALL_FIELDS),
            "skip_first_tokens": settings.skip_first_tokens,
            "batch_size": settings.batch_size,
            "dtype": checkpoint.dtype,
            "seed": settings.seed,
        },
        mode="static",
    )
    writer = StatsWriter(out, identity)
    names = checkpoint_names(checkpoint, skeleton)
    source = StatsFromRun(
        skeleton, checkpoint, structure, names, tokens, settings, work=out, device=device, listen=listen
    )
    total = len(structure.blocks)
    if len(writer.done) < total:
        for block in structure.blocks:
            listen(Event("calibrate", block.index, total, block.name))
            if block.index in writer.done:
                source.replay(block.index, dict)
                continue
            groups, stats = source.block(block.index)
            writer.write(block.index, groups, stats)
            source.finished(block.index, {})
            return_freed_memory()
    writer.finish()
    listen(Event("calibrate", total, total))
    return identity
