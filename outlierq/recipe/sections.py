"""The sections of a recipe, each frozen; unknown keys are refused."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from outlierq.core.errors import RecipeError, nearest
from outlierq.core.gguf.mixes import mixes
from outlierq.core.gguf.types import block_types
from outlierq.core.limits import Limits, TaskLimit, share
from outlierq.core.scheme import ActivationScheme, CacheScheme
from outlierq.recipe.patterns import HEAD, matches, sound, words_of
from outlierq.registry import format_limits

T = TypeVar("T")
GroupPolicy = Literal["smaller-group", "per-channel", "keep", "error"]
# The keys of a `quantize` section, and of an override, that say how numbers are stored.
SCHEME_KEYS = ("kind", "bits", "group_size", "block", "symmetric", "activations", "scales", "type")
Scales = Literal["plain", "two-level", "power-of-two"]
SELF = "self"  # the path of a text that the model itself writes
GROUP_COLUMNS = {"two-level": 16, "power-of-two": 32}  # of floats: NVFP4, and the OCP Microscaling formats


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(Section):
    """Where calibration text comes from: a file, or a data set of the Hub.

    path: of a file, `mix` for the texts of many kinds that ship with outlierq, `embedded` for the Python language
    reference, or `self` for text that the model itself writes, sampled by the seed of the calibration and kept beside
    the statistics. dataset: its id on the Hub, with `config` and `split`. column: that holds the text, of a data set or
    of a file with rows; found by itself where it has a usual name. split: of the data set. config: which of its parts.
    weight: the source's share of the windows, relative to the other sources.
    """

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


class ImageSource(Section):
    """Where calibration images come from: a folder, or a data set of the Hub.

    path: of the folder; `photo.txt` beside `photo.jpg` describes it. dataset: its id on the Hub. column: that holds the
    images. caption: the column that describes them. split: of the data set. config: which of its parts.
    """

    path: str | None = None
    dataset: str | None = None
    column: str = "image"
    caption: str | None = None
    split: str = "train"
    config: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ImageSource:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        return self


class Calibration(Section):
    """Which tokens the statistics are made of, and how.

    text: one source or several; a word is short for its path. images: put before the first windows of text, one each,
    as the model's processor does it. unseen_tokens: the first block also sees tokens that the text does not hold, as
    often as other text has them. samples: windows of text. sequence_length: tokens of a window. seed: of the choice
    among the windows; null takes the first ones. chat_template: documents are rendered as chats. skip_first_tokens: of
    each window, which count for nothing. sink_weight: the first token of each window counts so often in the hessian.
    mode: `static` statistics are of the original model, `sequential` ones of each block behind the quantized blocks.
    batch_size: windows that run at once. all_experts: every expert sees every token. min_expert_tokens: an expert that
    saw fewer is rounded without statistics of its own; left out, 256 where the method reads the hessian, else 64.
    inputs: whether the hessian is of inputs as they come, or as the client rounds them; then, in sequential mode, so do
    the blocks.
    shards: in how many parts the windows run, which decides the order of all sums; left out, one for each process.
    """

    text: tuple[TextSource, ...] = Field((TextSource(path="mix"),), min_length=1)
    images: ImageSource | None = None
    unseen_tokens: bool = True
    samples: int = Field(128, ge=1)
    sequence_length: int = Field(512, ge=2)
    seed: int | None = 0
    chat_template: bool = False
    skip_first_tokens: int = Field(0, ge=0)
    sink_weight: float = Field(4.0, gt=0)
    mode: Literal["static", "sequential"] = "static"
    inputs: Literal["exact", "rounded"] = "exact"
    batch_size: int = Field(4, ge=1)
    shards: int | None = Field(None, ge=1)
    all_experts: bool = False
    min_expert_tokens: int | None = Field(None, ge=0)

    @property
    def own_share(self) -> float:
        """The share of the text that the model itself writes."""
        own = (source.weight for source in self.text if source.path == SELF)
        return sum(own) / sum(source.weight for source in self.text)

    @property
    def runs(self) -> bool:
        """Whether statistics depend on the rest of the recipe, so that those of an earlier run do not do."""
        return self.mode == "sequential" or self.inputs == "rounded"

    @field_validator("text", mode="before")
    @classmethod
    def _text_in_short(cls, value: Any) -> list[Any]:
        """`text: mix` and `text: notes.txt` are short for a list with one source."""
        entries = value if isinstance(value, list | tuple) else [value]
        return [{"path": e} if isinstance(e, str) else e for e in entries]

    @field_validator("images", mode="before")
    @classmethod
    def _images_in_short(cls, value: T) -> T | dict[str, Any]:
        """`images: folder` is short for its path."""
        return {"path": value} if isinstance(value, str) else value


def _columns(value: Any) -> int | Literal["channel"] | None:
    """A group size is a positive number of columns or the word `channel`; None where it is left out."""
    if value is None or value == "channel" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        columns: int | Literal["channel"] | None = value
        return columns
    raise ValueError(f"must be a positive number of columns, or `channel` (this is {value!r})")


def _type(value: str | None) -> str | None:
    """The name of a type of GGUF, in capitals."""
    return None if value is None else _name_in(list(block_types()), value, "type of GGUF")


def _name_in(known: list[str], value: str, what: str) -> str:
    """`value` as it is spelt in a list; ValueError with the nearest name where it is not there."""
    name = value.upper()
    if name not in known:
        close = nearest(name, known)
        raise ValueError(f"{value!r} is no {what}; {f'did you mean {close}?' if close else ', '.join(known)}")
    return name


class Activations(Section):
    """Symmetric inputs of 8 or 4 bits for the quantized linears (see `ActivationScheme`).

    kind: `int`, or `float` for E4M3 (8 bits) and E2M1 (4 bits). bits: of an input. per: what has one scale.
    dynamic: a scale per token (or per group of columns) is computed at run time. Otherwise one scale per tensor is
    fixed from calibration. clip_search: how that one is chosen: with the least output error (`output`), or so that it
    just holds the largest input (`none`). scales: of `per: group`: `two-level` is NVFP4, whose unit is fixed from
    calibration (`dynamic: false`), `power-of-two` MXFP4 or MXFP8; plain ones belong to weights with a `block`.
    """

    kind: Literal["int", "float"] = "int"
    bits: Literal[4, 8] = 8
    dynamic: bool = True
    per: Literal["token", "tensor", "group"] = "token"
    clip_search: Literal["output", "none"] = "output"
    scales: Scales = "plain"

    @property
    def scheme(self) -> ActivationScheme:
        """How inputs are stored."""
        columns = GROUP_COLUMNS.get(self.scales, ActivationScheme.group_size)
        return ActivationScheme(self.kind, self.bits, self.dynamic, self.per, columns, self.scales)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that a static scale is made of."""
        return frozenset() if self.dynamic else frozenset({"abs_max", "rows", "first_rows"})


class KVCache(Section):
    """What a server is to keep keys and values in.

    numbers: `fp8` for E4M3 with calibrated scales; for `int8`, `int4` and `nvfp4` a server makes its own, so that
    nothing is written: the plan and the card say how it is told. per: of fp8, one scale for the keys and one for the
    values of a block (`tensor`), or one for each key-value head (`head`).
    """

    per: Literal["tensor", "head"] = "tensor"
    numbers: Literal["fp8", "int8", "int4", "nvfp4"] = "fp8"

    @property
    def scheme(self) -> CacheScheme:
        """How the cache is kept."""
        return CacheScheme(self.per, self.numbers)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the scales are made of."""
        return frozenset({"key_abs_max", "value_abs_max"}) if self.scheme.is_stored else frozenset()


class Override(Section):
    """Different storage for the linears whose module name fits a pattern (`patterns.matches`); later overrides win.

    match: a pattern, with `*` for anything, or a regular expression after `re:`. keep: leave them in 16 bits.
    activations: a section of its own, or `none` for inputs in 16 bits. All other keys are those of `quantize`.
    """

    match: str
    keep: bool = False
    bits: int | None = Field(None, ge=2, le=8)
    group_size: int | Literal["channel"] | None = None
    symmetric: bool | None = None
    kind: Literal["int", "float", "outlier-victim"] | None = None
    block: tuple[PositiveInt, PositiveInt] | None = None
    activations: Activations | Literal["none"] | None = None
    scales: Scales | None = None
    type: str | None = None

    _group_size = field_validator("group_size", mode="before")(_columns)
    _match = field_validator("match")(sound)
    _type = field_validator("type")(_type)


class Quantize(Section):
    """The scheme and the method. `options` are the method's own keys, written beside the others in YAML.

    method: that rounds. bits: of a code. group_size: neighbouring input columns that share a scale, or `channel` for
    one scale a row. symmetric: without zero points. when_indivisible: what becomes of a width that the groups do not
    divide. overrides: other storage for some linears; the last one that fits counts.
    kind: `int`, `float` for E4M3 weights (8 bits), E2M3 (6) and E2M1 (4), or `outlier-victim` for the pairs of OliVe
    (4 bits, where an outlier takes the code of its neighbour). block: rows and columns of E4M3 weights
    that share a scale, instead of group_size. activations: how inputs are quantized at run time; left out, they stay in
    16 bits. scales: how scales are stored (see `QuantScheme`): `two-level` is NVFP4, or Q4_K of GGUF; `power-of-two` is
    MXFP4, 6 or 8. type: a type of GGUF by its name ("Q6_K"), instead of the other keys of a scheme; mix: a mix of
    types ("Q4_K_M", see `core/gguf/mixes.py`), which overrides can change; embeddings: the type of the table of
    embeddings, which stays as it is without a mix or this key. ignore: patterns of the linears that stay in 16 bits.
    The output head stays there, too, unless the list is empty or an override names it. keep_share: of the weights in
    blocks at most, those of linears that the scheme is predicted to cost most: they get FP8, or keep 16 bits.
    """

    method: str
    kind: Literal["int", "float", "outlier-victim"] = "int"
    bits: int = Field(4, ge=2, le=8)
    group_size: int | Literal["channel"] = 128
    block: tuple[PositiveInt, PositiveInt] | None = None
    symmetric: bool = True
    activations: Activations | None = None
    scales: Scales = "plain"
    type: str | None = None
    mix: str | None = None
    embeddings: str | None = None
    when_indivisible: GroupPolicy = "smaller-group"
    ignore: tuple[str, ...] = ("*lm_head",)
    overrides: tuple[Override, ...] = ()
    keep_share: float | None = Field(None, gt=0, lt=1)
    options: dict[str, Any] = {}

    _group_size = field_validator("group_size", mode="before")(_columns)

    _type = field_validator("type", "embeddings")(_type)

    @field_validator("mix")
    @classmethod
    def _known_mix(cls, value: str | None) -> str | None:
        """The name of a mix, in capitals."""
        return None if value is None else _name_in(list(mixes()), value, "mix of types")

    @field_validator("ignore")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        """Every pattern can be read."""
        return tuple(map(sound, patterns))

    @property
    def scheme_settings(self) -> dict[str, Any]:
        """The keys that make the scheme."""
        return {name: getattr(self, name) for name in SCHEME_KEYS}

    def ignores(self, module: str) -> bool:
        """Whether a pattern keeps the linear called `module` in 16 bits."""
        return any(matches(module, pattern) for pattern in self.ignore)

    def protects(self, module: str, tower: str | None = None) -> bool:
        """Whether no pattern keeps it there, but that it is the output head, or in a tower, which no override names.

        tower: name of the part beside the text decoder that the linear belongs to.
        """
        words = [HEAD] if module.rpartition(".")[2] == HEAD else [] if tower is None else words_of(tower)
        if not words or self.ignores(module):
            return False
        return bool(self.ignore) and not any(word in override.match for override in self.overrides for word in words)


class Transform(Section):
    """A function-preserving rewrite that runs before rounding; its method's own keys stand beside it.

    method: that finds it.
    """

    method: str
    options: dict[str, Any] = {}


class Learn(Section):
    """What improves each block as a whole once its linears are rounded; its method's own keys stand beside it.

    method: that learns.
    """

    method: str
    options: dict[str, Any] = {}


class Export(Section):
    """How the result is written.

    format: of the files. max_shard_size: of one weight file, in bytes or as `5GB`.
    names: those of the source's tensors, or `class`: those of the parameters of transformers' class, for classes whose
    stored tensors it splits or joins, which it cannot do with packed ones.
    """

    format: str = "compressed-tensors"
    max_shard_size: str = "5GB"
    names: Literal["source", "class"] = "source"

    @field_validator("format")
    @classmethod
    def _known(cls, value: str) -> str:
        """The name of a registered format."""
        try:
            return format_limits(value).name
        except RecipeError as error:
            raise ValueError(f"{error.what}; {error.hint}" if error.hint else error.what) from None

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> str:
        """A number is a number of bytes; YAML reads `1000000` as one."""
        text = str(value)
        parse_size(text)
        return text


class Gate(Section):
    """What is measured on the result, beside the original, and what it may lose; exit code 3 when a limit fails.

    max_kl: mean KL divergence per token from the original, in nats. max_perplexity_increase: `3%` or 0.03. min_top1:
    share of positions with the original's most likely token. min_task: `mmlu:-1.0` (points against the original),
    `mmlu:40` (its own). text: a file, or `mix` or `embedded` for the held-out part of that text. windows: of
    it. window_length: tokens of a window. limit: samples per task. num_fewshot: examples in a task's prompt.
    batch_size: sequences of a task at a time. dtype: in which the models run.
    """

    max_kl: float | None = Field(None, ge=0, allow_inf_nan=False)
    max_perplexity_increase: float | None = None
    min_top1: float | None = None
    min_task: tuple[str, ...] = ()
    text: str = "mix"
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
    def _task_limits(cls, value: T) -> T | list[T]:
        """One limit may be written without a list."""
        entries: T | list[T] = [value] if isinstance(value, str) else value
        for entry in entries if isinstance(entries, list | tuple) else ():
            TaskLimit.parse(str(entry))
        return entries

    @property
    def limits(self) -> Limits:
        """The limits alone."""
        tasks = tuple(TaskLimit.parse(text) for text in self.min_task)
        return Limits(self.max_kl, self.max_perplexity_increase, self.min_top1, tasks)


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
