"""What is wrong with a recipe: every fault at once, each a sentence with its line and the nearest known name."""

from __future__ import annotations

from typing import Any

from outlierq.core.errors import RecipeError, nearest
from outlierq.core.machine.untrusted import brief
from outlierq.recipe.schema import WHOLE_MODEL, Recipe, overridden, scheme_of
from outlierq.recipe.sections import (
    GROUP_COLUMNS,
    SCHEME_KEYS,
    Activations,
    Calibration,
    Export,
    Gate,
    KVCache,
    Learn,
    Override,
    Quantize,
    Section,
    TextSource,
    Transform,
)
from outlierq.recipe.yaml_lines import KeyPath, Lines, at
from outlierq.registry import Asked, FormatLimits, format_limits, method, transform_method

MOVING = ("transform", "permute")  # kinds of transforms that change the input of a group
TYPES = ("type", "mix", "embeddings")  # keys that name types of GGUF


def failure(name: str, faults: list[str]) -> RecipeError:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return RecipeError(
        f"recipe {name}: {count}\n" + "\n".join(f"  - {fault}" for fault in faults),
        hint="`outlierq recipes show gptq-w4` prints a complete recipe with comments",
    )


def fault_of(error: Any, lines: Lines, known: list[str] | None = None) -> str:
    """One pydantic error as a sentence with line, key and the nearest known name."""
    path = error["loc"]
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        given = "" if error["type"] in ("missing", "value_error") else f" (this is {brief(repr(error['input']))})"
        return f"{at(path, lines)}{message}{given}"
    known = known or _fields_at(path[:-1])
    close = nearest(str(path[-1]), known)
    advice = f"did you mean {close!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{at(path, lines)}unknown key; {advice}"


def _fields_at(path: KeyPath) -> list[str]:
    """The keys that the section at `path` knows."""
    sections: dict[str | int, type[Section]] = {
        "calibration": Calibration,
        "quantize": Quantize,
        "transform": Transform,
        "export": Export,
        "text": TextSource,
        "overrides": Override,
        "activations": Activations,
        "kv_cache": KVCache,
        "gate": Gate,
        "learn": Learn,
    }
    named = [p for p in path if p in sections]
    model: type[Section] = sections[named[-1]] if named else Recipe
    return [name for name in model.model_fields if name not in ("options", "name")]


def impossible(recipe: Recipe) -> list[str]:
    """Combinations that cannot work, each as a sentence."""
    faults = []
    stages = [transform_method(t.method).stage for t in recipe.transform]
    late = [i for i in range(1, len(stages)) if stages[i] in WHOLE_MODEL and "transform" in stages[:i]]
    if late:
        name = recipe.transform[late[0]].method
        faults.append(f"transform.{late[0]}.method: {name} rewrites the whole model; it comes before the others")
    if recipe.turning and len(recipe.rewrites) > 1:
        name = recipe.turning[0].method
        faults.append(f"transform: {name} turns the whole model by what it sees of it; nothing else may rewrite it")
    if recipe.turning and recipe.calibration is None:
        name = recipe.turning[0].method
        faults.append(
            f"calibration: missing, but {name} lets the model run over its text; "
            "add a `calibration` section (`calibration: {}` takes the defaults)"
        )
    if recipe.quantize is None and any(stage not in WHOLE_MODEL for stage in stages):
        faults.append("transform: there is nothing to transform for without a `quantize` section")
    if recipe.needs and recipe.calibration is None:
        faults.append(
            f"calibration: missing, but the methods need {', '.join(sorted(recipe.needs))}; "
            "add a `calibration` section (`calibration: {}` takes the defaults)"
        )
    if "cross" in recipe.needs and recipe.calibration and not recipe.calibration.runs:
        name = recipe.quantize.method if recipe.quantize else "the method"
        faults.append(
            f"calibration.mode: {name} compares the inputs behind quantized blocks with the original ones; "
            "set `mode: sequential`"
        )
    faults += _unlearnable(recipe) + _rounded_inputs(recipe) + _kept_share(recipe)
    format = format_limits(recipe.export.format)
    faults += format.recipe_faults(_asked(recipe))
    if recipe.quantize is not None:
        faults += _unstorable_sections(recipe.quantize, format)
    if recipe.calibration and recipe.calibration.skip_first_tokens >= recipe.calibration.sequence_length:
        faults.append(
            f"calibration.skip_first_tokens: {recipe.calibration.skip_first_tokens} leaves nothing of a "
            f"sequence_length of {recipe.calibration.sequence_length}"
        )
    return faults


def _unlearnable(recipe: Recipe) -> list[str]:
    """What learning on whole blocks lacks."""
    if recipe.learn is None:
        return []
    if recipe.quantize is None:
        return ["learn: there is nothing to learn without a `quantize` section"]
    sections = (recipe.quantize.activations, *(override.activations for override in recipe.quantize.overrides))
    exact = recipe.calibration is None or recipe.calibration.inputs == "exact"
    if exact and any(isinstance(section, Activations) for section in sections):
        return [
            f"calibration.inputs: {recipe.learn.method} learns on inputs as they are rounded; set `inputs: rounded`"
        ]
    if recipe.calibration is None or recipe.calibration.mode != "sequential":
        name = recipe.learn.method
        return [f"calibration.mode: {name} learns on the inputs behind quantized blocks; set `mode: sequential`"]
    return []


def _rounded_inputs(recipe: Recipe) -> list[str]:
    """What is wrong with statistics of rounded inputs."""
    if recipe.calibration is None or recipe.calibration.inputs == "exact" or recipe.quantize is None:
        return []
    moving = next((t.method for t in recipe.transform if transform_method(t.method).stage in MOVING), None)
    if moving is not None:
        return [f"calibration.inputs: {moving} changes what is rounded after it was calibrated; set `inputs: exact`"]
    sections = (recipe.quantize.activations, *(each.activations for each in recipe.quantize.overrides))
    asked = [each for each in sections if isinstance(each, Activations)]
    if not asked:
        return ["calibration.inputs: nothing rounds inputs; add `quantize.activations`, or set `inputs: exact`"]
    if any(not each.dynamic and each.per == "tensor" for each in asked):
        return ["calibration.inputs: one scale of a whole input is fixed after calibration; set `inputs: exact`"]
    return []


def _kept_share(recipe: Recipe) -> list[str]:
    """What is wrong with keeping the linears that cost most."""
    if recipe.quantize is None or recipe.quantize.keep_share is None:
        return []
    if recipe.export.format != "compressed-tensors":
        return [f"quantize.keep_share: {recipe.export.format} holds no FP8 beside other numbers; leave it out"]
    whole = next((step.method for step in recipe.rewrites), None)
    if whole is not None:
        return [f"quantize.keep_share: {whole} rewrites the model, and what is kept is predicted of the source"]
    if recipe.calibration is None:
        return ["quantize.keep_share: predicting needs text; add a `calibration` section"]
    return []


def _asked(recipe: Recipe) -> Asked:
    """What the recipe asks of its format, beside schemes."""
    rounding, calibration = recipe.quantize, recipe.calibration
    return Asked(
        method=None if rounding is None else rounding.method,
        gives=frozenset() if rounding is None else method("quantize", rounding.method).gives_with(rounding.options),
        cache=recipe.stored_cache is not None,
        sequential=calibration is not None and calibration.mode == "sequential",
    )


def _unstorable_sections(quantize: Quantize, format: type[FormatLimits]) -> list[str]:
    """The faults of the scheme, and those that an override adds to it."""
    settings = quantize.scheme_settings
    common = _unstorable(settings) + format.scheme_faults(scheme_of(settings)) + _beside_type(quantize, format)
    if quantize.block and "group_size" in quantize.model_fields_set and quantize.group_size != "channel":
        common.append("group_size: leave it out where `block` is given")
    faults = [f"quantize.{fault}" for fault in common]
    for number, override in enumerate(quantize.overrides):
        if not override.keep:
            own = overridden(settings, override)
            own_faults = _unstorable(own) + format.scheme_faults(scheme_of(own)) + _beside_type(override, format)
            faults += [f"quantize.overrides.{number}.{fault}" for fault in own_faults if fault not in common]
    return faults


def _beside_type(section: Quantize | Override, format: type[FormatLimits]) -> list[str]:
    """Keys that stand beside a type or mix of GGUF, which decides them, and a format that has no such types."""
    asked = [name for name in TYPES if getattr(section, name, None) is not None]
    if asked and not format.holds_types:
        return [f"{asked[0]}: {format.name} has no types of GGUF; `export.format: gguf` has"]
    if not {"type", "mix"} & set(asked):
        return []
    given = [name for name in SCHEME_KEYS if name in section.model_fields_set and name != "type"]
    given += ["type"] if "mix" in asked and "type" in asked else []
    return [f"{name}: leave it out, the {asked[-1] if name == 'type' else asked[0]} decides it" for name in given]


def _unstorable(settings: dict[str, Any]) -> list[str]:
    """What no format or client can hold, as "key: reason"; what this one cannot, it says itself."""
    if settings["type"] is not None:
        return []
    faults = []
    if settings["kind"] == "outlier-victim":
        return _unstorable_pairs(settings)
    if settings["kind"] == "float":
        if settings["bits"] not in (4, 6, 8):
            faults.append(
                f"bits: `kind: float` is E4M3 with 8 bits, E2M3 with 6 or E2M1 with 4 (this is {settings['bits']})"
            )
        if not settings["symmetric"]:
            faults.append("symmetric: `kind: float` has no zero points")
        if settings["bits"] == 4 and settings["scales"] == "plain":
            faults.append("scales: 4-bit floats have `two-level` scales (NVFP4) or `power-of-two` ones (MXFP4)")
        elif settings["bits"] == 6 and settings["scales"] == "plain":
            faults.append("scales: 6-bit floats have `power-of-two` scales (MXFP6)")
        elif settings["scales"] != "plain":
            faults += _unstorable_blocks(settings)
        elif settings["block"] is None and settings["group_size"] != "channel":
            faults.append("group_size: `kind: float` has one scale per `channel`, or per `block: [128, 128]`")
    elif settings["block"] is not None:
        faults.append("block: only weights of `kind: float` have scales per block")
    elif settings["scales"] != "plain":
        faults += _unstorable_levels(settings)
    if isinstance(settings["activations"], Activations):
        faults += [f"activations.{fault}" for fault in _unstorable_inputs(settings, settings["activations"])]
    return faults


def _unstorable_pairs(settings: dict[str, Any]) -> list[str]:
    """What pairs of an outlier and its victim are not."""
    meant = {"bits": 4, "symmetric": True, "scales": "plain", "block": None, "activations": None}
    group, wrong = settings["group_size"], [key for key, value in meant.items() if settings[key] != value]
    faults = [
        f"{key}: `kind: outlier-victim` has {_only(meant[key])} (this is {brief(settings[key])})" for key in wrong
    ]
    if isinstance(group, int) and group % 2:
        faults.append(f"group_size: pairs need an even number of columns (this is {group})")
    return faults


def _only(value: object) -> str:
    """The value that a key must have, in words."""
    return "none" if value is None else str(value).lower()


def _unstorable_blocks(settings: dict[str, Any]) -> list[str]:
    """What neither NVFP4, MXFP4, MXFP6 nor MXFP8 is."""
    scales, columns = settings["scales"], GROUP_COLUMNS[settings["scales"]]
    name = "NVFP4" if scales == "two-level" else f"MXFP{settings['bits']}"
    bits = settings["bits"]
    if scales == "two-level" and bits != 4:
        return [f"scales: `two-level` ones are for floats of 4 bits (this is {bits}); others have `power-of-two` ones"]
    if settings["block"] is not None or settings["group_size"] != columns:
        return [f"group_size: {name} has groups of {columns} columns"]
    return []


def _unstorable_levels(settings: dict[str, Any]) -> list[str]:
    """What Q4_K is not."""
    shape = (settings["scales"], settings["bits"], settings["symmetric"], settings["group_size"])
    if shape != ("two-level", 4, False, 32):
        return ["scales: integers have `two-level` scales in `symmetric: false` groups of 32 (Q4_K), or `plain` ones"]
    return []


def _unstorable_inputs(settings: dict[str, Any], activations: Activations) -> list[str]:
    """The same for the inputs of the linears."""
    faults = []
    if not settings["symmetric"]:
        faults.append("kind: quantized inputs need symmetric weights")
    if activations.dynamic and "clip_search" in activations.model_fields_set:
        faults.append("clip_search: scales computed at run time are not searched; leave it out")
    if activations.scales != "plain":
        return faults + _unstorable_input_blocks(settings, activations)
    by_tokens = (activations.kind, activations.bits, activations.per) == ("float", 8, "token")
    if settings["scales"] != "plain":
        faults.append(f"scales: weights with `{settings['scales']}` scales have inputs with such scales")
    elif activations.kind != settings["kind"] and not (by_tokens and settings["bits"] == 4):
        faults.append(f"kind: must be that of the weights, {settings['kind']} (this is {activations.kind})")
    if activations.kind == "float" and activations.bits != 8:
        faults.append(f"bits: `kind: float` with plain scales is E4M3, which has 8 bits (this is {activations.bits})")
    if not activations.dynamic and activations.per != "tensor":
        faults.append("per: a static scale is one per `tensor`; set `dynamic: true` for scales per token")
    if activations.dynamic and activations.per == "tensor":
        faults.append("per: scales computed at run time are per `token`; one per tensor is static (`dynamic: false`)")
    if (settings["block"] is None) == (activations.per == "group"):
        faults.append("per: `group` belongs to weights with a `block`, and they to it")
    elif settings["block"] is not None and settings["block"][1] != activations.scheme.group_size:
        faults.append(f"per: groups of inputs have {activations.scheme.group_size} columns, so must the block")
    return faults


def _unstorable_input_blocks(settings: dict[str, Any], activations: Activations) -> list[str]:
    """What no client multiplies: inputs in groups of 16 or 32 columns beside weights that are stored otherwise."""
    faults = []
    if activations.kind != "float" or activations.per != "group":
        faults.append(f"scales: `{activations.scales}` ones belong to `kind: float` and `per: group`")
    elif (settings["kind"], settings["scales"]) != ("float", activations.scales):
        faults.append(f"scales: inputs with `{activations.scales}` scales need float weights with such scales")
    elif activations.bits < settings["bits"] or (activations.scales == "two-level" and activations.bits != 4):
        faults.append(f"bits: no client multiplies {settings['bits']}-bit weights with {activations.bits}-bit inputs")
    if activations.dynamic != (activations.scales == "power-of-two"):
        how = "dynamic: their unit is fixed from calibration (`dynamic: false`)"
        faults.append(how if activations.dynamic else "dynamic: powers of two are computed at run time; leave it out")
    return faults
