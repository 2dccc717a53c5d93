"""`outlierq study write`: what a method of the studies makes of a model, as a plain checkpoint in its own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import ArgumentError
from outlierq.core.model import Checkpoint, from_matrix
from outlierq.core.report import Report
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.detect import BlockData
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.remodel.approximated import ApproximatedCheckpoint
from outlierq.pipeline.studying.contenders import Contender, contenders
from outlierq.pipeline.studying.methods import Conditions
from outlierq.pipeline.studying.rounding import approximated, importance_of, method_of, options_by_block
from outlierq.recipe import load

if TYPE_CHECKING:
    import torch


def study_write(
    checkpoint: Checkpoint,
    name: str,
    stats: Path,
    conditions: Conditions,
    out: Path,
    *,
    resources: Resources = USUAL,
) -> Report:
    """Write the model that a contender of `study methods` is judged by. stats: of `outlierq calibrate`.

    The file is as large as the original's: zeros are stored, and rounded weights in 16 bits. ArgumentError for a
    contender that is a recipe.
    """
    (contender,) = contenders([name], conditions.bits)
    if contender.recipe:
        raise ArgumentError(
            f"{name!r} is a recipe: `outlierq quantize -r {contender.recipe}` writes it", argument="method"
        )
    made = _approximated(checkpoint, contender, stats, conditions)
    return quantize(make_plan(made, load("dense")), out, resources=resources)


def _approximated(
    checkpoint: Checkpoint, contender: Contender, stats: Path, conditions: Conditions
) -> ApproximatedCheckpoint:
    """The checkpoint whose weights are those of the contender when they are read."""
    from outlierq.calibrate.stored.stats_file import StatsReader
    from outlierq.load import served
    from outlierq.load.source.shards import torch_dtype

    source, reader = served(checkpoint), StatsReader(stats)
    schemes = make_plan(checkpoint, load("gptq-w4", conditions.settings)).schemes
    options = options_by_block(contender, stats, checkpoint, schemes, source)
    asked, importance = method_of(contender), importance_of(contender, conditions.texts(stats, checkpoint))

    def made(index: int) -> dict[str, torch.Tensor]:
        block = BlockData(index, *reader.block(index), None)
        changed = {}
        for parts, _, _ in approximated(asked, block, schemes, source, options[index], importance):
            for site, each in parts.items():
                dtype = torch_dtype(source.tensors[site.weight].dtype)
                changed[site.weight] = from_matrix(site, each.whole).to(dtype)
        return changed

    blocks = {site.weight: site.block for site in schemes if site.block in options}
    identity = ["study", contender.name, conditions.settings, reader.identity.to_json(), str(conditions.general or "")]
    note = f"study: weights of {len(blocks)} linears as {contender.name} leaves them, decoded; no smaller than before"
    return ApproximatedCheckpoint(source, identity, blocks, made, note)
