"""What a step that turns the model needs, made before the plan: the model runs, and the method decides."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq import __version__
from outlierq.core.errors import OutlierqError, RecipeError, during
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.model import Checkpoint
from outlierq.core.notes import collecting
from outlierq.core.scheme import ActivationScheme
from outlierq.export.writer import disk_error
from outlierq.load.source.shards import torch_dtype
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.sources import refuse_changed
from outlierq.pipeline.block.stats_run import token_set
from outlierq.pipeline.ledger.folder import refuse_existing
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.processes.ranks import refuse_several
from outlierq.pipeline.remodel.anatomy import find_anatomy
from outlierq.pipeline.remodel.rewrite import original_of
from outlierq.pipeline.remodel.turned import possible_turns, read_turns, turns_bytes
from outlierq.pipeline.turning.seen import Way, turnable
from outlierq.recipe import Calibration, Recipe
from outlierq.registry import transform_method
from outlierq.transform.rotations.merging import residual_norms, scale_name
from outlierq.transform.stage import storable_scale

if TYPE_CHECKING:
    from outlierq.transform.rotate import Anatomy
    from outlierq.transform.rotations.turnable import Turns

BATCH_TOKENS = 1024  # that go through a block together
HELD_OUT = 8  # one batch of so many is held out
WINDOWS = 64  # of the calibration text, at most: matrices learn from few


def remove_turns(out: Path) -> None:
    """The run for `out` is done: what was made here for it lies in it."""
    with suppress(OSError):
        _file(out).unlink(missing_ok=True)


def turns_for(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    given: Path | None = None,
    restart: bool = False,
    resources: Resources = USUAL,
) -> Path | None:
    """The file of turns that a recipe's step needs, made here, beside `out`; None for a recipe without one.

    A stopped run that has it goes on with it. RecipeError before any work for a model that cannot be turned, and for
    statistics, `given`, that would not be of the turned model.
    """
    if not recipe.turning:
        return None
    name = recipe.turning[0].method
    refuse_several(name)
    if resources.max_memory is not None:
        raise OutlierqError(f"{name} has no ceiling of memory: what learning holds is not known beforehand")
    file, plan = _file(out), make_plan(checkpoint, recipe)
    if given is not None:
        refuse_changed(plan, given)
    identity = _identity(plan, recipe)
    if not restart and _identity_of(file) == identity:
        return file
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with during("transform", name), collecting() as notes:
        turns = _made(plan, recipe, out.parent, resources)
    content = turns_bytes(turns, notes, identity)
    try:
        write_atomically(file, content)
    except OSError as error:
        raise disk_error(error, file, len(content)) from error
    return file


def _file(out: Path) -> Path:
    return out.with_name(f"{out.name}.turns")


def _identity(plan: Plan, recipe: Recipe) -> str:
    """Of all that turns depend on, in hexadecimal digits."""
    step, source = recipe.turning[0], original_of(plan.checkpoint)
    text = (recipe.calibration or Calibration()).model_dump(mode="json")
    inputs = {module: str(scheme) for module, scheme in _schemes(plan).items()}
    made_of = [__version__, source.fingerprint, step.method, step.options, text, inputs]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _identity_of(file: Path) -> str:
    """The identity of a file that an earlier run has left; empty where there is none."""
    if not file.is_file():
        return ""
    try:
        return read_turns(file)[2]
    except RecipeError:  # cut off, or another program's: it is made anew
        return ""


def _schemes(plan: Plan) -> dict[str, ActivationScheme]:
    """How the inputs of linears are rounded, by module."""
    inputs = {site.module: scheme.activations for site, scheme in plan.schemes.items()}
    return {module: scheme for module, scheme in inputs.items() if scheme is not None}


def _made(plan: Plan, recipe: Recipe, work: Path, resources: Resources) -> Turns:
    """What the method makes of the model on the recipe's text."""
    step = recipe.turning[0]
    method, source = transform_method(step.method), original_of(plan.checkpoint)
    settings = recipe.calibration or Calibration()
    settings = settings.model_copy(update={"samples": min(settings.samples, WINDOWS)})
    ids = token_set(plan.model, settings).ids
    size = max(1, min(BATCH_TOKENS // settings.sequence_length, len(ids) // HELD_OUT))
    anatomy = find_anatomy(source)
    possible = possible_turns(anatomy, method, step.options)
    way = Way(size, resources.device, work, resources.listen)
    with turnable(source, anatomy, possible, _schemes(plan), ids, way) as model:
        turns = method.function(model, **step.options)
    return _storable(turns, anatomy, source)


def _storable(turns: Turns, anatomy: Anatomy, source: Checkpoint) -> Turns:
    """The turns with scales of norms whose new gains are exact in the dtype that they are stored in."""
    import torch

    changed = dict(turns)
    for path in anatomy.gains:
        if scale_name(path) in turns:
            gain, dtype = source.read(path.weight).double(), torch_dtype(source.tensors[path.weight].dtype)
            changed[scale_name(path)] = storable_scale(gain, turns[scale_name(path)], dtype, 0.0)
    for norm in residual_norms(anatomy):
        scale = turns.get(scale_name(norm))
        if scale is not None:
            dtype, offset = torch_dtype(source.tensors[norm.weight].dtype), 1.0 if norm.offset else 0.0
            changed[scale_name(norm)] = storable_scale(torch.ones_like(scale), scale, dtype, offset)
    return changed
