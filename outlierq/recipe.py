"""YAML -> checked, frozen `Recipe`. Unknown keys are errors, with their line and the nearest known name."""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from outlierq.core.errors import RecipeError, nearest
from outlierq.core.limits import Limits, TaskLimit, share
from outlierq.core.machine.untrusted import brief, yaml_tree
from outlierq.core.scheme import ActivationScheme, CacheScheme, QuantScheme
from outlierq.registry import Method, method, transform_method

WHOLE_MODEL = ("prune", "rewrite")  # kinds of transforms
FROM_SETTING = 0  # stands for a line number where a value was given with --set
GroupPolicy = Literal["smaller-group", "per-channel", "keep", "error"]
# The keys of a `quantize` section, and of an override, that say how numbers are stored.
SCHEME_KEYS = ("kind", "bits", "group_size", "block", "symmetric", "activations", "scales")
Scales = Literal["plain", "two-level", "power-of-two"]


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(Section):
    """Where calibration text comes from: a file (`path`, or the word `embedded`), or a `dataset` of the Hub."""

    path: str | None = None
    dataset: str | None = None
    column: str | None = None
    split: str | None = None
    config: str | None = None
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> TextSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        return self


class Calibration(Section):
    """Which tokens the statistics are made of, and how.

    shards: in how many parts the windows run, which decides the order of all sums; left out, one for each process.
    """

    text: tuple[TextSource, ...] = Field((TextSource(path="embedded"),), min_length=1)
    samples: int = Field(128, ge=1)
    sequence_length: int = Field(512, ge=2)
    seed: int | None = 0
    chat_template: bool = False
    skip_first_tokens: int = Field(0, ge=0)
    sink_weight: float = Field(4.0, gt=0)
    mode: Literal["static", "sequential"] = "static"
    batch_size: int = Field(4, ge=1)
    shards: int | None = Field(None, ge=1)
    all_experts: bool = False
    min_expert_tokens: int | None = Field(None, ge=0)

    @field_validator("text", mode="before")
    @classmethod
    def _text_in_short(cls, value: Any) -> Any:
        """`text: embedded` and `text: notes.txt` are short for a list with one source."""
        entries = value if isinstance(value, list | tuple) else [value]
        return [{"path": e} if isinstance(e, str) else e for e in entries]


def _columns(value: Any) -> Any:
    """A group size is a positive number of columns or the word `channel`; None where it is left out."""
    if value is None or value == "channel" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError(f"must be a positive number of columns, or `channel` (this is {value!r})")


class Activations(Section):
    """8-bit (or, as an experiment, 4-bit) symmetric inputs of the quantized linears (see `ActivationScheme`).

    dynamic: a scale per token (or per group of columns) is computed at run time. Otherwise one scale per tensor is
    fixed from calibration; clip_search then chooses the one with the least output error (`output`), or the one that
    just holds the largest input (`none`).
    """

    kind: Literal["int", "float"] = "int"
    bits: Literal[4, 8] = 8
    dynamic: bool = True
    per: Literal["token", "tensor", "group"] = "token"
    clip_search: Literal["output", "none"] = "output"

    @property
    def scheme(self) -> ActivationScheme:
        """How inputs are stored."""
        return ActivationScheme(self.kind, self.bits, self.dynamic, self.per)


class KVCache(Section):
    """Calibrated scales for a KV cache in E4M3: one per tensor, or one per key-value head."""

    per: Literal["tensor", "head"] = "tensor"

    @property
    def scheme(self) -> CacheScheme:
        """How the cache is stored."""
        return CacheScheme(self.per)


class Override(Section):
    """Different storage for the linears whose module name matches a glob pattern; later overrides win.

    activations: a section of its own, or `none` for inputs in 16 bits.
    """

    match: str
    keep: bool = False
    bits: int | None = Field(None, ge=2, le=8)
    group_size: int | Literal["channel"] | None = None
    symmetric: bool | None = None
    kind: Literal["int", "float"] | None = None
    block: tuple[PositiveInt, PositiveInt] | None = None
    activations: Activations | Literal["none"] | None = None
    scales: Scales | None = None

    _group_size = field_validator("group_size", mode="before")(_columns)


class Quantize(Section):
    """The scheme and the method. `options` are the method's own keys, written beside the others in YAML.

    kind: `int`, or `float` for E4M3 weights (8 bits) and E2M1 weights (4 bits). block: rows and columns of E4M3 weights
    that share a scale, instead of group_size. activations: how inputs are quantized at run time; left out, they stay in
    16 bits. scales: how scales are stored (see `QuantScheme`): `two-level` is NVFP4, or Q4_K of GGUF; `power-of-two` is
    MXFP4.
    """

    method: str
    kind: Literal["int", "float"] = "int"
    bits: int = Field(4, ge=2, le=8)
    group_size: int | Literal["channel"] = 128
    block: tuple[PositiveInt, PositiveInt] | None = None
    symmetric: bool = True
    activations: Activations | None = None
    scales: Scales = "plain"
    when_indivisible: GroupPolicy = "smaller-group"
    ignore: tuple[str, ...] = ("*lm_head",)
    overrides: tuple[Override, ...] = ()
    options: dict[str, Any] = {}

    _group_size = field_validator("group_size", mode="before")(_columns)


class Transform(Section):
    """A function-preserving rewrite that runs before rounding."""

    method: str
    options: dict[str, Any] = {}


class Export(Section):
    """How the result is written."""

    format: Literal[
        "compressed-tensors", "awq", "gptq", "gptq-v2", "gguf", "dense", "bitsandbytes", "outlierq-split"
    ] = "compressed-tensors"
    max_shard_size: str = "5GB"

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> str:
        """A number is a number of bytes; YAML reads `1000000` as one."""
        text = str(value)
        parse_size(text)
        return text


class Gate(Section):
    """What is measured on the result, beside the original, and what it may lose; exit code 3 when a limit is passed.

    max_perplexity_increase: `3%` or 0.03. min_task: `mmlu:-1.0` (points against the original), `mmlu:40` (its own).
    text: a file, or the word `embedded` for the held-out part of the embedded text. limit: samples per task.
    """

    max_kl: float | None = Field(None, ge=0, allow_inf_nan=False)
    max_perplexity_increase: float | None = None
    min_top1: float | None = None
    min_task: tuple[str, ...] = ()
    text: str = "embedded"
    windows: int = Field(24, ge=1)
    window_length: int = Field(512, ge=2)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    batch_size: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("max_perplexity_increase", "min_top1", mode="before")
    @classmethod
    def _share(cls, value: Any) -> float | None:
        """`3%` is 0.03."""
        return None if value is None else share(value)

    @field_validator("min_task", mode="before")
    @classmethod
    def _task_limits(cls, value: Any) -> Any:
        """One limit may be written without a list."""
        entries = [value] if isinstance(value, str) else value
        for entry in entries if isinstance(entries, list | tuple) else ():
            TaskLimit.parse(str(entry))
        return entries

    @property
    def limits(self) -> Limits:
        """The limits alone."""
        tasks = tuple(TaskLimit.parse(text) for text in self.min_task)
        return Limits(self.max_kl, self.max_perplexity_increase, self.min_top1, tasks)


class Recipe(Section):
    """Everything a run does, apart from its source and its output folder."""

    description: str = ""
    calibration: Calibration | None = None
    transform: tuple[Transform, ...] = ()
    quantize: Quantize | None = None
    kv_cache: KVCache | None = None
    export: Export = Export()
    gate: Gate | None = None
    name: str = Field("recipe", exclude=True)

    @property
    def rewrites(self) -> tuple[Transform, ...]:
        """The transforms of the whole model; they come first."""
        return tuple(t for t in self.transform if transform_method(t.method).stage in WHOLE_MODEL)

    @property
    def pruning(self) -> tuple[Transform, ...]:
        """The steps that drop experts."""
        return tuple(step for step in self.transform if transform_method(step.method).stage == "prune")

    def clip_search_for(self, module: str) -> bool:
        """Whether the scale of the static input of the linear called `module` is searched."""
        chosen = None if self.quantize is None else _activations_for(self.quantize, module)
        return chosen is not None and chosen.clip_search == "output"

    @property
    def group_transforms(self) -> tuple[Transform, ...]:
        """The transforms of one input group after another."""
        return tuple(t for t in self.transform if transform_method(t.method).stage == "transform")

    @property
    def permutations(self) -> tuple[Transform, ...]:
        """What brings channels into another order; done last, where that costs nothing."""
        return tuple(t for t in self.transform if transform_method(t.method).stage == "permute")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the methods of this recipe read; empty for a data-free recipe.

        Without those of the whole model that pruning reads, which are made before the others.
        """
        used = (transform_method(step.method) for step in self.transform)
        needs = frozenset().union(*(each.needs for each in used if each.stage != "prune"))
        if self.quantize is not None:
            needs |= method("quantize", self.quantize.method).needs
            if self.quantize.options.get("scale_search") == "hessian":
                needs |= {"hessian"}
            activations = [section.activations for section in (self.quantize, *self.quantize.overrides)]
            if any(isinstance(wanted, Activations) and not wanted.dynamic for wanted in activations):
                needs |= {"abs_max", "rows", "first_rows"}
            elif needs and any(activations):
                needs |= {"rows"}  # so that the report can say what quantized inputs cost
        if self.kv_cache is not None:
            needs |= {"key_abs_max", "value_abs_max"}
        return needs

    @property
    def fingerprint(self) -> str:
        """sha256 hex of everything that decides the result; a gate only judges it.

        Without the number of shards, which may be left to the number of processes: runs keep that beside it.
        """
        aside = {"description": True, "gate": True, "calibration": {"shards"}}
        text = json.dumps(self.model_dump(mode="json", exclude=aside), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def scheme_for(self, module: str, scale_dtype: str) -> QuantScheme | None:
        """The scheme asked for the linear called `module`, or None when the recipe keeps it in 16 bits."""
        if self.quantize is None or any(fnmatchcase(module, pattern) for pattern in self.quantize.ignore):
            return None
        wanted = {name: getattr(self.quantize, name) for name in SCHEME_KEYS}
        for override in self.quantize.overrides:
            if fnmatchcase(module, override.match):
                if override.keep:
                    return None
                wanted = _overridden(wanted, override)
        return _scheme(wanted, scale_dtype)


def _activations_for(quantize: Quantize, module: str) -> Activations | None:
    """The section on inputs that holds for the linear called `module`."""
    wanted = quantize.activations
    for override in quantize.overrides:
        if fnmatchcase(module, override.match) and override.activations is not None:
            wanted = override.activations
    return wanted if isinstance(wanted, Activations) else None


def _overridden(wanted: dict[str, Any], override: Override) -> dict[str, Any]:
    """`wanted` with the keys that an override gives. A group size replaces a block."""
    given = {name: value for name in SCHEME_KEYS if (value := getattr(override, name)) is not None}
    return wanted | ({"block": None} if "group_size" in given else {}) | given


def _scheme(wanted: dict[str, Any], scale_dtype: str) -> QuantScheme:
    """The scheme of the keys `SCHEME_KEYS`."""
    activations = wanted["activations"]
    return QuantScheme(
        bits=wanted["bits"],
        group_size=None if wanted["group_size"] == "channel" or wanted["block"] else wanted["group_size"],
        symmetric=wanted["symmetric"],
        scale_dtype=scale_dtype,
        kind=wanted["kind"],
        block=wanted["block"],
        activations=activations.scheme if isinstance(activations, Activations) else None,
        scales=wanted["scales"],
    )


def parse_size(text: str) -> int:
    """Bytes of "5GB", "512MiB", "1000"; ValueError otherwise."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.strip().rstrip("BbKkMmGgIi").strip()
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 512MiB") from None
    if size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def shipped() -> dict[str, Path]:
    """The recipes that come with outlierq, by name."""
    folder = Path(str(resources.files("outlierq") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def description(path: Path) -> str:
    """The one-line description in a recipe file, without checking the rest."""
    return str(yaml.safe_load(path.read_text(encoding="utf-8")).get("description", ""))


def find(reference: str) -> Path:
    """The file of a recipe given as a path or as the name of a shipped recipe (with or without `.yaml`)."""
    path = Path(reference)
    if path.is_file():
        return path
    known = shipped()
    name = reference.removesuffix(".yaml")
    if name in known:
        return known[name]
    close = nearest(name, list(known))
    raise RecipeError(
        f"there is no recipe file {reference!r} and no shipped recipe of that name; shipped: {', '.join(known)}",
        hint=f"did you mean {close!r}?" if close else "give a path to a YAML file, or see `outlierq recipes list`",
    )


def load(reference: str, settings: list[str] | None = None) -> Recipe:
    """Read a recipe, apply `key=value` settings, and check it; RecipeError lists every fault at once."""
    path = find(reference)
    return parse(read(path), name=path.stem, settings=settings)


def read(path: Path) -> str:
    """The text of a recipe file; RecipeError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: byte {error.start} does not fit") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error


def parse(text: str, *, name: str = "recipe", settings: list[str] | None = None) -> Recipe:
    """Check the text of a recipe. `settings` are `quantize.group_size=64`, as given to `--set`."""
    faults: list[str] = []
    content, tree = yaml_tree(text, name, RecipeError)
    lines = _lines(tree, faults)
    if not isinstance(content, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values, this is a {type(content).__name__}")
    for setting in settings or []:
        path = _apply(content, setting)
        lines |= {path[: end + 1]: FROM_SETTING for end in range(len(path)) if path[: end + 1] not in lines}
        lines[path] = FROM_SETTING
    if "name" in content:
        faults.append(f"{_at(('name',), lines)}unknown key; a recipe is named after its file")
        del content["name"]
    for section in _method_sections(content):
        _split_options(content, section, faults, lines)
    try:
        recipe = Recipe.model_validate({**content, "name": name})
    except ValidationError as error:
        faults += [_fault(e, lines) for e in error.errors()]
        raise _failure(name, faults) from None
    if not any("there is no " in fault for fault in faults):
        faults += _impossible(recipe)
    if faults:
        raise _failure(name, faults)
    return recipe


def _failure(name: str, faults: list[str]) -> RecipeError:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return RecipeError(
        f"recipe {name}: {count}\n" + "\n".join(f"  - {fault}" for fault in faults),
        hint="`outlierq recipes show gptq-w4` prints a complete recipe with comments",
    )


def _lines(tree: yaml.Node | None, faults: list[str]) -> dict[tuple, int]:
    """1-based line of every key path in the YAML tree. A key that is given twice is a fault: YAML keeps the last."""
    found: dict[tuple, int] = {}

    def walk(node: yaml.Node | None, path: tuple) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line, first = key.start_mark.line + 1, found.get((*path, key.value))
                if first is not None:
                    name = ".".join(map(str, (*path, key.value)))
                    faults.append(f"line {line}, {name}: given twice, first in line {first}")
                found[(*path, key.value)] = line
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                found[(*path, i)] = value.start_mark.line + 1
                walk(value, (*path, i))

    walk(tree, ())
    return found


def _apply(content: dict, setting: str) -> tuple:
    """Set one `dotted.key=value` and return its path.

    The value is read as YAML, so `false`, `64` and `[a, b]` mean what they look like.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {setting!r} is not of the form key=value", hint="e.g. --set quantize.group_size=64")
    value, _ = yaml_tree(text, f"--set {brief(setting)}: {brief(repr(text))} is not a YAML value", RecipeError)
    path: list[str | int] = []
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        path.append(_key_in(node, part, setting))
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[path[-1]]
    path.append(_key_in(node, last, setting))
    node[path[-1]] = value
    return tuple(path)


def _key_in(node: Any, part: str, setting: str) -> str | int:
    """`part` as a key of the mapping or an index of the list `node`; RecipeError when it is neither."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    held = f"a list of {len(node)}" if isinstance(node, list) else repr(node)
    raise RecipeError(
        f"--set {setting}: there is no {part!r} in {held}", hint="keys are dotted: quantize.group_size=64"
    )


def _method_sections(content: dict) -> list[tuple]:
    """Paths of the sections that name a method."""
    transforms = content.get("transform")
    found: list[tuple] = [("transform", i) for i in range(len(transforms))] if isinstance(transforms, list) else []
    return [*found, ("quantize",)] if isinstance(content.get("quantize"), dict) else found


def _split_options(content: dict, path: tuple, faults: list[str], lines: dict[tuple, int]) -> None:
    """Move the method's own keys of a section into `options`, checked against the method's signature."""
    parent, key = (content, path[0]) if len(path) == 1 else (content[path[0]], path[1])
    section = parent[key]
    if isinstance(section, str):
        section = {"method": section}
    if not isinstance(section, dict) or not isinstance(section.get("method"), str):
        parent[key] = section
        return
    stage, model = path[0], Quantize if path[0] == "quantize" else Transform
    own = [name for name in model.model_fields if name != "options"]
    try:
        chosen = transform_method(section["method"]) if stage == "transform" else method(stage, section["method"])
    except RecipeError as error:
        faults.append(f"{_at((*path, 'method'), lines)}{error.what}" + (f" ({error.hint})" if error.hint else ""))
        parent[key] = {k: v for k, v in section.items() if k in own}
        return
    rest = {k: v for k, v in section.items() if k not in own}
    try:
        options = _options_model(chosen).model_validate(rest).model_dump(exclude_unset=True)
    except ValidationError as error:
        known = [*own, *chosen.options]
        faults += [_fault({**e, "loc": (*path, *e["loc"])}, lines, known) for e in error.errors()]
        options = {}
    parent[key] = {**{k: v for k, v in section.items() if k in own}, "options": options}


def _options_model(chosen: Method) -> type[BaseModel]:
    """A pydantic model of a method's keyword-only arguments."""
    wanted = {name: (p.annotation, p.default) for name, p in chosen.options.items()}
    return create_model(chosen.name, __config__=ConfigDict(extra="forbid"), **wanted)


def _at(path: tuple, lines: dict[tuple, int]) -> str:
    """ "line 7, quantize.bits: " (the nearest known line), or "--set quantize.bits: " for a value given there."""
    key = ".".join(str(p) for p in path if p != "options")
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            line = lines[path[:end]]
            return f"--set {key}: " if line == FROM_SETTING else f"line {line}, {key}: "
    return f"{key}: "


def _fault(error: Any, lines: dict[tuple, int], known: list[str] | None = None) -> str:
    """One pydantic error as a sentence with line, key and the nearest known name."""
    path = error["loc"]
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        given = "" if error["type"] in ("missing", "value_error") else f" (this is {brief(repr(error['input']))})"
        return f"{_at(path, lines)}{message}{given}"
    known = known or _fields_at(path[:-1])
    close = nearest(str(path[-1]), known)
    advice = f"did you mean {close!r}?" if close else f"known keys: {', '.join(known)}"
    return f"{_at(path, lines)}unknown key; {advice}"


def _fields_at(path: tuple) -> list[str]:
    """The keys that the section at `path` knows."""
    sections = {
        "calibration": Calibration,
        "quantize": Quantize,
        "transform": Transform,
        "export": Export,
        "text": TextSource,
        "overrides": Override,
        "activations": Activations,
        "kv_cache": KVCache,
        "gate": Gate,
    }
    named = [p for p in path if p in sections]
    model = sections[named[-1]] if named else Recipe
    return [name for name in model.model_fields if name not in ("options", "name")]


def _impossible(recipe: Recipe) -> list[str]:
    """Combinations that cannot work, each as a sentence."""
    faults = []
    stages = [transform_method(t.method).stage for t in recipe.transform]
    late = [i for i in range(1, len(stages)) if stages[i] in WHOLE_MODEL and "transform" in stages[:i]]
    if late:
        name = recipe.transform[late[0]].method
        faults.append(f"transform.{late[0]}.method: {name} rewrites the whole model; it comes before the others")
    if recipe.quantize is None and any(stage not in WHOLE_MODEL for stage in stages):
        faults.append("transform: there is nothing to transform for without a `quantize` section")
    if recipe.needs and recipe.calibration is None:
        faults.append(
            f"calibration: missing, but the methods need {', '.join(sorted(recipe.needs))}; "
            "add a `calibration` section (`calibration: {}` takes the defaults)"
        )
    if recipe.quantize is None and recipe.kv_cache is None and recipe.export.format != "dense":
        faults.append("export.format: without a `quantize` section only `dense` can be written")
    if recipe.export.format == "gguf" and recipe.calibration and recipe.calibration.mode == "sequential":
        faults.append("calibration.mode: sequential reads back what was written, which gguf does not offer; use static")
    if recipe.kv_cache is not None and recipe.export.format != "compressed-tensors":
        faults.append(f"export.format: {recipe.export.format} holds no scales of a KV cache; compressed-tensors does")
    if recipe.quantize is not None:
        faults += _unstorable_sections(recipe.quantize, recipe.export.format)
        faults += _wrong_method_for(recipe.quantize, recipe.export.format)
    if recipe.calibration and recipe.calibration.skip_first_tokens >= recipe.calibration.sequence_length:
        faults.append(
            f"calibration.skip_first_tokens: {recipe.calibration.skip_first_tokens} leaves nothing of a "
            f"sequence_length of {recipe.calibration.sequence_length}"
        )
    return faults


def _unstorable_sections(quantize: Quantize, form: str) -> list[str]:
    """The faults of the scheme, and those that an override adds to it."""
    wanted = {name: getattr(quantize, name) for name in SCHEME_KEYS}
    common = _unstorable(wanted, form)
    if quantize.block and "group_size" in quantize.model_fields_set and quantize.group_size != "channel":
        common.append("group_size: leave it out where `block` is given")
    faults = [f"quantize.{fault}" for fault in common]
    for number, override in enumerate(quantize.overrides):
        if not override.keep:
            found = _unstorable(_overridden(wanted, override), form)
            faults += [f"quantize.overrides.{number}.{fault}" for fault in found if fault not in common]
    return faults


def _wrong_method_for(quantize: Quantize, form: str) -> list[str]:
    """A method whose result the format cannot hold."""
    if quantize.method == "int8_split" and form not in ("outlierq-split", "dense"):
        return [f"export.format: {form} cannot keep outlier columns in 16 bits; outlierq-split can"]
    if form == "outlierq-split" and quantize.method != "int8_split":
        return [f"quantize.method: outlierq-split is the format of int8_split (this is {quantize.method})"]
    searched = quantize.options.get("scale_search", "minmax") != "minmax"
    if form == "bitsandbytes" and (quantize.method != "rtn" or searched):
        return ["quantize.method: bitsandbytes scales a row by its largest weight: `rtn`, `scale_search: minmax`"]
    return []


def _unstorable(wanted: dict[str, Any], form: str) -> list[str]:
    """What no format or client can hold, as "key: reason"."""
    faults = []
    if wanted["kind"] == "float":
        if wanted["bits"] not in (4, 8):
            faults.append(f"bits: `kind: float` is E4M3 with 8 bits or E2M1 with 4 (this is {wanted['bits']})")
        if not wanted["symmetric"]:
            faults.append("symmetric: `kind: float` has no zero points")
        if wanted["bits"] == 4:
            faults += _unstorable_float4(wanted)
        elif wanted["block"] is None and wanted["group_size"] != "channel":
            faults.append("group_size: `kind: float` has one scale per `channel`, or per `block: [128, 128]`")
    elif wanted["block"] is not None:
        faults.append("block: only weights of `kind: float` have scales per block")
    if wanted["scales"] != "plain" and wanted["bits"] != 4:
        faults.append(f"scales: `{wanted['scales']}` ones are for weights of 4 bits (this is {wanted['bits']})")
    elif wanted["scales"] != "plain" and wanted["kind"] == "int":
        faults += _unstorable_levels(wanted, form)
    if isinstance(wanted["activations"], Activations):
        faults += [f"activations.{fault}" for fault in _unstorable_inputs(wanted, wanted["activations"])]
        if form == "dense":
            faults.append("activations: `export.format: dense` cannot say that inputs are quantized")
    return faults


def _unstorable_float4(wanted: dict[str, Any]) -> list[str]:
    """What neither NVFP4 nor MXFP4 is."""
    faults = []
    if wanted["scales"] == "plain":
        faults.append("scales: 4-bit floats have `two-level` scales (NVFP4) or `power-of-two` ones (MXFP4)")
    else:
        name, columns = {"two-level": ("NVFP4", 16), "power-of-two": ("MXFP4", 32)}[wanted["scales"]]
        if wanted["block"] is not None or wanted["group_size"] != columns:
            faults.append(f"group_size: {name} has groups of {columns} columns")
    if isinstance(wanted["activations"], Activations):
        faults.append("activations: 4-bit floats are written with 16-bit inputs only")
    return faults


def _unstorable_levels(wanted: dict[str, Any], form: str) -> list[str]:
    """What Q4_K is not."""
    shape = (wanted["scales"], wanted["symmetric"], wanted["group_size"])
    if shape != ("two-level", False, 32):
        return ["scales: integers have `two-level` scales in `symmetric: false` groups of 32 (Q4_K), or `plain` ones"]
    if form not in ("gguf", "dense"):
        return [f"scales: {form} has no two-level scales of integers; `export.format: gguf` has"]
    return []


def _unstorable_inputs(wanted: dict[str, Any], activations: Activations) -> list[str]:
    """The same for the inputs of the linears."""
    faults = []
    if activations.kind != wanted["kind"]:
        faults.append(f"kind: must be that of the weights, {wanted['kind']} (this is {activations.kind})")
    if activations.kind == "float" and activations.bits != 8:
        faults.append(f"bits: `kind: float` is E4M3, which has 8 bits (this is {activations.bits})")
    if not wanted["symmetric"]:
        faults.append("kind: quantized inputs need symmetric weights")
    if not activations.dynamic and activations.per != "tensor":
        faults.append("per: a static scale is one per `tensor`; set `dynamic: true` for scales per token")
    if activations.dynamic and activations.per == "tensor":
        faults.append("per: scales computed at run time are per `token`; one per tensor is static (`dynamic: false`)")
    if activations.dynamic and "clip_search" in activations.model_fields_set:
        faults.append("clip_search: scales computed at run time are not searched; leave it out")
    if (wanted["block"] is None) == (activations.per == "group"):
        faults.append("per: `group` belongs to weights with a `block`, and they to it")
    elif wanted["block"] is not None and wanted["block"][1] != activations.scheme.group_size:
        faults.append(f"per: groups of inputs have {activations.scheme.group_size} columns, so must the block")
    return faults
