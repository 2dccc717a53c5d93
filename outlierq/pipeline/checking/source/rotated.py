"""A rotated result of which no report says how: the rotations of the shipped recipes are tried on the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from outlierq.core.errors import OutlierqError
from outlierq.pipeline.checking.weights import relative_error
from outlierq.pipeline.remodel.rewrite import rewritten
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint
    from outlierq.recipe import Recipe

# Relative error of a tensor that is that of the rotated source: rounding to 4 bits leaves 0.15, another rotation 1.4.
SAME, TRIED = 0.5, 4


def rotated_like(plain: Checkpoint, reference: Checkpoint) -> Checkpoint:
    """The source as one of the shipped rotations leaves it, where a table or a linear of the result fits that and not
    the source; else the source.
    """
    if any(_fits(plain, reference, name) for name in _probes(plain, reference)):
        return reference
    for recipe in _rotations():
        try:
            candidate = rewritten(reference, recipe)
            names = _probes(plain, candidate)
            if isinstance(candidate, RewrittenCheckpoint) and any(_fits(plain, candidate, name) for name in names):
                return candidate
        except OutlierqError:
            continue  # not possible for this model
    return reference


def _rotations() -> Iterator[Recipe]:
    """Shipped recipes that rewrite the model without statistics, one of each kind."""
    from outlierq.recipe import load
    from outlierq.recipe.shipped import shipped

    seen = set()
    for name in shipped():
        recipe = load(name, [])
        steps = [step for step in recipe.rewrites if step.method == "rotate"]
        kind = str([step.options for step in steps])
        if steps and len(steps) == len(recipe.rewrites) and kind not in seen:
            seen.add(kind)
            yield recipe


def _probes(plain: Checkpoint, reference: Checkpoint) -> list[str]:
    """A few matrices: the first and the last ones."""
    both = [
        name
        for name, info in reference.tensors.items()
        if len(info.shape) == 2 and name in plain.tensors and plain.tensors[name].shape == info.shape
    ]
    return [*both[:TRIED], *both[-TRIED:]]


def _fits(plain: Checkpoint, reference: Checkpoint, name: str) -> bool:
    """Whether a tensor is that of the reference, but for rounding."""
    now, then = plain.read(name).float(), reference.read(name).float()
    return bool(now.isfinite().all()) and relative_error(now, then) < SAME
