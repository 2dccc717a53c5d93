"""Rewrites of the whole model, as a checkpoint on top of the checkpoint: everything after works on it as on any other.

A tensor is computed when it is read, so the model is never in memory. Before a run the rewritten model is proved: its
float32 logits on a short probe must be those of the original.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import NumbersError, SourceError
from outlierq.core.model import CarriedFile, Checkpoint, Structure, TensorInfo
from outlierq.pipeline.events import Event, Listener, return_freed_memory, silent
from outlierq.pipeline.pruning import PrunedCheckpoint, pruned
from outlierq.registry import transform_method

if TYPE_CHECKING:
    import torch

    from outlierq.recipe import Recipe
    from outlierq.transform.rotate import Rewrite

FLOATS = ("F64", "F32", "F16", "BF16")


class RewrittenCheckpoint:
    """A checkpoint with changed tensors. Satisfies `Checkpoint`.

    original: what is read. rewrite: what changes. notes: what was done, for the report.
    """

    def __init__(self, original: Checkpoint, rewrite: Rewrite, identity: Any):
        self.original, self.rewrite, self._identity = original, rewrite, identity
        self.source, self.kind, self.dtype = original.source, original.kind, original.dtype
        self.path, self.revision = getattr(original, "path", None), getattr(original, "revision", None)
        self.notes: tuple[str, ...] = rewrite.notes
        self.config: dict[str, Any] = original.config
        self.tensors: dict[str, TensorInfo] = dict(original.tensors)
        if rewrite.untied:
            self._untie(*rewrite.untied)
        for name in rewrite.changes:
            dtype = self.tensors[name].dtype
            if dtype not in FLOATS:
                raise SourceError(
                    f"{name} is stored as {dtype}; only {', '.join(FLOATS)} tensors can be rewritten",
                    hint="start from the original checkpoint",
                )

    def _untie(self, head: str, table: str) -> None:
        """Give the head a tensor of its own, and say what that costs."""
        shared = self.tensors[table]
        self.tensors[head] = TensorInfo(head, shared.dtype, shared.shape, shared.nbytes)
        self.config = _untied(self.config)
        self.notes += (f"rotate: {head} can no longer share the tensor of {table}: {shared.nbytes:,} bytes more",)

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """The files of the original."""
        return self.original.files

    @property
    def fingerprint(self) -> str:
        """Of the original, the methods and their options."""
        text = json.dumps([self.original.fingerprint, self._identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """The tensor, rewritten, in its stored dtype."""
        from outlierq.load.shards import torch_dtype

        change = self.rewrite.changes.get(name)
        if change is None:
            return self.original.read(name)
        return change.apply(self.original.read, torch_dtype(self.tensors[name].dtype))

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors."""
        return {name: self.read(name) for name in names}


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config, and those nested in it, with a head that shares nothing."""
    changed = {
        key: _untied(value) if isinstance(value, dict) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    }
    return {**changed, "tie_word_embeddings": False}


def rewritten(checkpoint: Checkpoint, recipe: Recipe, *, trust_remote_code: bool = False) -> Checkpoint:
    """The checkpoint as the rewrites of the recipe leave it; the checkpoint itself when there are none.

    No weights are read, except for the gain of the last norm. RecipeError when a rewrite is not possible.
    """
    for step in recipe.rewrites:
        method = transform_method(step.method)
        if method.stage == "prune":
            checkpoint = pruned(checkpoint, method, step.options, trust_remote_code=trust_remote_code)
            continue
        from outlierq.pipeline.anatomy import find_anatomy

        anatomy = find_anatomy(checkpoint, trust_remote_code=trust_remote_code)
        rewrite = method.function(anatomy, **step.options)
        checkpoint = RewrittenCheckpoint(checkpoint, rewrite, [step.method, step.options])
    return checkpoint


def original_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint below all rewrites."""
    while isinstance(checkpoint, RewrittenCheckpoint | PrunedCheckpoint):
        checkpoint = checkpoint.original
    return checkpoint


def _same_function(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint below all rewrites that must not change what the model computes."""
    while isinstance(checkpoint, RewrittenCheckpoint):
        checkpoint = checkpoint.original
    return checkpoint


def rewrite_notes(checkpoint: Checkpoint) -> list[str]:
    """What the rewrites did, in order."""
    if not isinstance(checkpoint, RewrittenCheckpoint | PrunedCheckpoint):
        return []
    return [*rewrite_notes(checkpoint.original), *checkpoint.notes]


def prove_rewrite(
    checkpoint: Checkpoint,
    skeleton: torch.nn.Module,
    structure: Structure,
    names: Mapping[str, str],
    listen: Listener = silent,
) -> float | None:
    """Relative difference of the rewritten model's float32 logits from the original's; None without a rewrite.

    The whole model runs on a short probe, one block in memory at a time; of large vocabularies the first tokens are
    compared. NumbersError above 1e-4.
    """
    if not isinstance(checkpoint, RewrittenCheckpoint):
        return None
    from outlierq.pipeline.anatomy import TOLERANCE, Bench, Weights, relative_error

    original = _same_function(checkpoint)
    bench = Bench(skeleton, structure)
    shared = _shared_heads(checkpoint)
    plain = Weights(
        {slot: shared.get(tensor, tensor) for slot, tensor in names.items()},
        lambda name, rows: original.read(name)[:rows],
    )
    changed = Weights(names, lambda name, rows: _exact(checkpoint, name, rows))
    expected = _logits(bench, plain, listen)
    error = relative_error(_logits(bench, changed, listen), expected)
    if not error <= TOLERANCE:
        raise NumbersError(
            f"rewriting the model changed its float32 logits by {error:.2e}, more than {TOLERANCE:g}",
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
        return _exact(checkpoint.original, name, rows)
    return change.apply(lambda source: _exact(checkpoint.original, source, None), torch.float32, rows=rows)


def _shared_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor that a rewrite added for a head -> the tensor that the head shared."""
    shared: dict[str, str] = {}
    while isinstance(checkpoint, RewrittenCheckpoint):
        shared |= dict([checkpoint.rewrite.untied] if checkpoint.rewrite.untied else [])
        checkpoint = checkpoint.original
    return shared


def _logits(bench: Any, weights: Any, listen: Listener) -> torch.Tensor:
    """Logits of the whole model on the probe."""
    hidden, blocks = bench.before(weights), bench.structure.blocks
    for block in blocks:
        listen(Event("prove", block.index, len(blocks), block.name))
        hidden = bench.block(weights, block.index, hidden)
        return_freed_memory()
    listen(Event("prove", len(blocks), len(blocks)))
    return bench.after(weights, hidden)
