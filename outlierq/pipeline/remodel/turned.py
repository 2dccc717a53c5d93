"""A model whose channels are turned by what was seen or learned of it: the file of turns, and the rewrite it makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import RecipeError
from outlierq.core.model import CarriedFile, Checkpoint
from outlierq.pipeline.remodel.rewritten import TURNS_NAME, RewrittenCheckpoint
from outlierq.registry import Method

if TYPE_CHECKING:
    from outlierq.transform.rotate import Anatomy
    from outlierq.transform.rotations.turnable import Turns

ABOUT = "about"  # the one key of the file's header: safetensors writes several in any order


def turned(checkpoint: Checkpoint, method: Method, options: Mapping[str, Any], file: Path | None) -> Checkpoint:
    """The checkpoint with the turns of a file merged; without one it cannot be read. RecipeError when none fit."""
    from outlierq.pipeline.remodel.anatomy import find_anatomy
    from outlierq.transform.rotations.merging import merged

    anatomy = find_anatomy(checkpoint)
    possible = possible_turns(anatomy, method, options)
    notes = (f"{method.name}: {_of(possible)}", *_left_alone(anatomy, method, options))
    if file is None:
        pending = f"{method.name}: how the model is turned is known once it has run over the calibration text"
        rewrite = merged(anatomy, possible, notes, pending=pending)
        return RewrittenCheckpoint(checkpoint, rewrite, method.name, options)
    turns, said, _ = read_turns(file)
    strange = [name for name, each in turns.items() if name not in possible or each.shape != possible[name].shape]
    if strange or not turns:
        raise RecipeError(f"the turns in {file} are of another model: {', '.join(strange[:1]) or 'there are none'}")
    rewrite = merged(anatomy, turns, (*notes, *(f"{method.name}: {sentence}" for sentence in said)))
    kept = CarriedFile(TURNS_NAME, path=str(file), content=file.read_bytes())
    return RewrittenCheckpoint(checkpoint, rewrite, method.name, options, kept)


def possible_turns(anatomy: Anatomy, method: Method, options: Mapping[str, Any]) -> Turns:
    """The turns that the model allows, of the kinds that the method knows and the options leave on; none of them
    changes anything. RecipeError when there are none.
    """
    from outlierq.transform.rotations.merging import identity_turns
    from outlierq.transform.rotations.turnable import kind_of

    on = _kinds_on(method, options)
    turns = {name: each for name, each in identity_turns(anatomy).items() if kind_of(name) in on}
    if not turns:
        reasons = "; ".join(_left_alone(anatomy, method, options)) or "all kinds of turns are off"
        raise RecipeError(
            f"{method.name} changes nothing: {reasons.replace(f'{method.name}: ', '')}",
            hint=f"remove `{method.name}` from the `transform` section",
        )
    return turns


def _kinds_on(method: Method, options: Mapping[str, Any]) -> set[str]:
    """The kinds of turns that a method makes with these options: each has an option of its name, scales a plural."""
    from outlierq.transform.rotations.turnable import RESIDUAL, SCALE, VALUES

    keys = {RESIDUAL: "residual", VALUES: "values", SCALE: "scales"}
    known = {kind: key for kind, key in keys.items() if key in method.options}
    return {kind for kind, key in known.items() if options.get(key, method.options[key].default)}


def _left_alone(anatomy: Anatomy, method: Method, options: Mapping[str, Any]) -> list[str]:
    """What the model does not allow, as sentences."""
    from outlierq.transform.rotations.turnable import RESIDUAL, VALUES

    on = _kinds_on(method, options)
    said = []
    if RESIDUAL in on and anatomy.residual_obstacle:
        said.append(f"{method.name}: the residual stream is left as it is: {anatomy.residual_obstacle}")
    if VALUES in on and not anatomy.values:
        said.append(f"{method.name}: values are left as they are: {anatomy.values_obstacle or 'there are none'}")
    return said


def _of(turns: Turns) -> str:
    """What is turned, in words."""
    from outlierq.transform.rotations.turnable import RESIDUAL, SCALE, VALUES, kind_of

    counts = {kind: sum(kind_of(name) == kind for name in turns) for kind in (RESIDUAL, VALUES, SCALE)}
    parts = [f"the residual stream of {turns[RESIDUAL].shape[-1]} channels"] if counts[RESIDUAL] else []
    parts += [f"the values of {counts[VALUES]} blocks, by key-value head"] if counts[VALUES] else []
    parts += [f"scales of {counts[SCALE]} inputs"] if counts[SCALE] else []
    return ", ".join(parts)


def read_turns(file: Path) -> tuple[Turns, list[str], str]:
    """The turns of a file, in the shapes that `Turnable` names, what its method noted, and what they were made of.

    RecipeError for another file.
    """
    import json

    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            turns = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            about = json.loads((opened.metadata() or {}).get(ABOUT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise RecipeError(f"the turns in {file} cannot be read: {error}") from error
    if any(each.dtype != torch.float64 or not bool(each.isfinite().all()) for each in turns.values()):
        raise RecipeError(f"the turns in {file} are no finite float64 numbers")
    return turns, about.get("notes", []), about.get("made_of", "")


def turns_bytes(turns: Turns, notes: list[str], made_of: str) -> bytes:
    """The content of a file of turns, each in the shape that `Turnable` names."""
    import json

    from safetensors.torch import save

    tensors = {name: each.contiguous() for name, each in turns.items()}
    content: bytes = save(tensors, metadata={ABOUT: json.dumps({"notes": notes, "made_of": made_of})})
    return content
