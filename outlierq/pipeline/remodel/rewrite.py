"""Rewrites of the whole model, as a checkpoint on top of the checkpoint: everything after works on it as on any other.

A tensor is computed when it is read, so the model is never in memory. Before a run the rewritten model is proved: its
float32 logits on a short probe must be those of the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import NumbersError, during, hinted
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.model import Checkpoint, DerivedCheckpoint, StudiedModel
from outlierq.core.move import UNCHANGED
from outlierq.export import format_type
from outlierq.load.model.conversion.class_named import class_named
from outlierq.load.model.experts.apart import with_parts
from outlierq.load.packed.decoded import DAMAGED, ServedCheckpoint
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.remodel.approximated import ApproximatedCheckpoint
from outlierq.pipeline.remodel.prune import PrunedCheckpoint, pruned
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint
from outlierq.pipeline.remodel.turned import turned
from outlierq.registry import Method, transform_method

if TYPE_CHECKING:
    import torch

    from outlierq.recipe import Recipe
    from outlierq.transform.add_biases import Openings
    from outlierq.transform.even_keys import Keys
    from outlierq.transform.rotate import Anatomy


def rewritten(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    expert_stats: Path | None = None,
    experts: Mapping[str, list[int]] | None = None,
    turns: Path | None = None,
) -> Checkpoint:
    """The checkpoint as the rewrites of the recipe leave it, under the names that it asks for; the checkpoint itself
    when there is nothing to change.

    No weights are read, except for the gain of the last norm. experts: those that an earlier run kept, by block; they
    need no statistics. turns: the file of what was seen or learned for a step that turns the model; without it a plan
    has the right sizes, and cannot be followed. RecipeError when a rewrite is not possible.
    """
    if recipe.export.names == "class":
        checkpoint = class_named(checkpoint)
    for step in recipe.rewrites:
        method = transform_method(step.method)
        if method.stage == "prune":
            checkpoint = pruned(checkpoint, method, step.options, stats=expert_stats, experts=experts)
            continue
        if method.stage == "turn":
            checkpoint = turned(checkpoint, method, step.options, turns)
            continue
        rewrite = method.function(_looked_at(checkpoint, method, step.options, recipe), **step.options)
        checkpoint = RewrittenCheckpoint(checkpoint, rewrite, step.method, step.options)
    return checkpoint


def _looked_at(
    checkpoint: Checkpoint, method: Method, options: Mapping[str, Any], recipe: Recipe
) -> Anatomy | Keys | Openings:
    """What the rewrite wants to know of the model."""
    if method.reads == "anatomy":
        from outlierq.pipeline.remodel.anatomy import find_anatomy

        return find_anatomy(checkpoint)
    if method.reads == "keys":
        from outlierq.pipeline.remodel.keys import find_keys

        return find_keys(checkpoint, options.get("stats_folder"))
    from outlierq.pipeline.remodel.openings import find_openings

    refusal = format_type(recipe.export.format).no_new_biases
    return find_openings(checkpoint, refusal=refusal)


def original_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint below all rewrites."""
    checkpoint = with_parts(checkpoint)
    while isinstance(checkpoint, RewrittenCheckpoint | PrunedCheckpoint | ApproximatedCheckpoint):
        checkpoint = checkpoint.original
    return checkpoint


def kept_experts(checkpoint: Checkpoint) -> dict[str, Any]:
    """`experts` of the record: by block, the numbers of those that pruning left; empty when nothing was pruned."""
    checkpoint = with_parts(checkpoint)
    while isinstance(checkpoint, RewrittenCheckpoint):
        checkpoint = checkpoint.original
    return {"experts": checkpoint.survivors} if isinstance(checkpoint, PrunedCheckpoint) else {}


def _rewrites(checkpoint: Checkpoint) -> list[RewrittenCheckpoint]:
    """The rewrites that must not change what the model computes, the last one first."""
    rewrites, checkpoint = [], with_parts(checkpoint)
    while isinstance(checkpoint, RewrittenCheckpoint):
        rewrites.append(checkpoint)
        checkpoint = checkpoint.original
    return rewrites


def changing_method(checkpoint: Checkpoint) -> str | None:
    """The first method that made another model of the original, whose statistics therefore do not fit; None if none
    did: biases of zeros change nothing.
    """
    checkpoint = with_parts(checkpoint)
    if isinstance(checkpoint, PrunedCheckpoint):
        return changing_method(checkpoint.original) or checkpoint.method
    if not isinstance(checkpoint, RewrittenCheckpoint):
        return None
    return changing_method(checkpoint.original) or (checkpoint.method if checkpoint.rewrite.changes else None)


def new_shifts(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Input group -> (bias of its producer, note), for shifts that biases of zeros have made possible."""
    return {group: shift for each in _rewrites(checkpoint) for group, shift in each.rewrite.shifts.items()}


def source_notes(checkpoint: Checkpoint) -> list[str]:
    """What is to be known of a source that was compressed; nothing of a plain one."""
    source = served_source(checkpoint)
    return [] if source is None else source.notes


def served_source(checkpoint: Checkpoint) -> ServedCheckpoint | None:
    """What a compressed source serves, below all that is done to it; None for a plain one."""
    while isinstance(checkpoint, DerivedCheckpoint) and not isinstance(checkpoint, ServedCheckpoint):
        checkpoint = checkpoint.original
    return checkpoint if isinstance(checkpoint, ServedCheckpoint) else None


def check_source(checkpoint: Checkpoint, listen: Listener = silent) -> None:
    """Look at every scale of a compressed source before work begins. SourceError when one is none.

    Weights that come from the Hub one file at a time are looked at when they are read.
    """
    source = served_source(checkpoint)
    if source is None or source.digests:
        return
    for number, name in enumerate(source.packed):
        listen(Event("check", number, len(source.packed), name))
        with during("check", name), hinted(DAMAGED):
            source.original.check_scales(name)


def rewrite_notes(checkpoint: Checkpoint) -> list[str]:
    """What the rewrites did, in order."""
    checkpoint = with_parts(checkpoint)
    if not isinstance(checkpoint, RewrittenCheckpoint | PrunedCheckpoint | ApproximatedCheckpoint):
        return []
    return [*rewrite_notes(checkpoint.original), *checkpoint.notes]


def prove_rewrite(model: StudiedModel, listen: Listener = silent) -> float | None:
    """Relative difference of the rewritten model's float32 logits from the original's; None without a changed tensor.

    The whole model runs on a short probe, one block in memory at a time; of large vocabularies the first tokens are
    compared. NumbersError above 1e-4.
    """
    rewrites = _rewrites(model.checkpoint)
    if not any(each.rewrite.changes for each in rewrites):
        return None
    from outlierq.load import study
    from outlierq.pipeline.remodel.anatomy import Bench, Weights, relative_error

    if model.checkpoint is not with_parts(model.checkpoint):
        model = study(with_parts(model.checkpoint))
    checkpoint, names = model.checkpoint, model.names

    original = rewrites[-1].original
    bench = Bench(model)
    shared = dict(each.rewrite.untied for each in rewrites if each.rewrite.untied)
    added = {name: each for each in rewrites for name in each.rewrite.zeros}

    def as_it_was(name: str, rows: int | None) -> torch.Tensor:
        return (added[name].zeros(name) if name in added else original.read(name))[:rows]

    plain = Weights({slot: shared.get(tensor, tensor) for slot, tensor in names.items()}, as_it_was)
    changed = Weights(names, lambda name, rows: _exact(checkpoint, name, rows))
    expected = _logits(bench, plain, listen)
    error = relative_error(_logits(bench, changed, listen), expected)
    if not error <= UNCHANGED:
        raise NumbersError(
            f"rewriting the model changed its float32 logits by {error:.2e}, more than {UNCHANGED:g}",
            hint="this is a fault of outlierq; remove `rotate` from the `transform` section and report it",
        )
    return error


def _exact(checkpoint: Checkpoint, name: str, rows: int | None) -> torch.Tensor:
    """A tensor of the rewritten checkpoint in float32, before it is rounded to its stored dtype."""
    import torch

    if not isinstance(checkpoint, RewrittenCheckpoint):
        return checkpoint.read(name)[:rows]
    change = checkpoint.rewrite.changes.get(name)
    if change is None:
        return checkpoint.zeros(name) if name in checkpoint.rewrite.zeros else _exact(checkpoint.original, name, rows)
    return change.apply(lambda source: _exact(checkpoint.original, source, None), torch.float32, rows=rows)


def _logits(bench: Any, weights: Any, listen: Listener) -> torch.Tensor:
    """Logits of the whole model on the probe."""
    hidden, blocks = bench.before(weights), bench.structure.blocks
    for block in blocks:
        listen(Event("prove", block.index, len(blocks), block.name))
        hidden = bench.block(weights, block.index, hidden)
        return_freed_memory()
    listen(Event("prove", len(blocks), len(blocks)))
    logits: torch.Tensor = bench.after(weights, hidden)
    return logits
