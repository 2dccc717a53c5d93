"""What `stats.json` may hold, and the tensors beside it: checked before any of it is used, since files travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from outlierq.core.errors import OutlierqError, StatsError
from outlierq.core.machine.untrusted import brief
from outlierq.core.stats import InputStats

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MOST_CHANNELS = 1 << 22
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Length = Annotated[int, Field(ge=0, le=MOST_CHANNELS)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]  # in the folder, nowhere else


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _File(_Part):
    file: FileName
    sha256: str


class _Fold(_Part):
    index: list[Annotated[list[Length], Field(min_length=2, max_length=2)]]


class _Site(_Part):
    module: str
    in_features: Length


class _Group(_Part):
    name: str
    sites: list[_Site]
    fold: _Fold | None
    fold_note: str
    tokens: Count = 0
    sequences: Count = 0
    routed: bool = False
    parts: list[_Group] = []


class _Made(_File):
    read: dict[str, str]


class _Block(_Made):
    index: NonNegativeInt
    groups: list[_Group]
    output_names: list[str]
    notes: list[str]


class _List(_Part):
    model_fingerprint: str
    token_fingerprint: str
    token_description: str
    settings: dict[str, Any]
    mode: str
    tokenizer: str
    stamps: dict[str, list[int]]
    calibration: dict[str, Any]
    logits: _Made | None
    sensitivity: _Made | None = None
    blocks: list[_Block]


def check_list(values: Mapping[str, Any], name: str, kind: type[OutlierqError]) -> None:
    """`kind` when the list of blocks holds something of another type, or leads out of its folder."""
    try:
        listed = _List.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise kind(
            f"{name} is not valid at {brief(where)}: {first['msg']} (this is {brief(first['input'])})",
            hint="calibrate again",
        ) from None
    for block in listed.blocks:
        for group in block.groups:
            _check_fold(group, name, kind)


def _check_fold(group: _Group, name: str, kind: type[OutlierqError]) -> None:
    """A fold's map has one entry for each channel; its runs could stand for any number."""
    width = group.sites[0].in_features if group.sites else 0
    if group.fold and sum(length for _, length in group.fold.index) != width:
        raise kind(f"{name}: the fold of {brief(group.name)} does not map its {width} channels", hint="calibrate again")
    for part in group.parts:
        _check_fold(part, name, kind)


# Shapes of the statistics of an input of K channels; None is any number.
CHANNELS, ANY = "K", None
SHAPES: dict[str, tuple[Any, ...]] = {
    "hessian": (CHANNELS, CHANNELS),
    "cross": (CHANNELS, CHANNELS),
    "first_change": (ANY, CHANNELS),
    "first_rounded": (ANY, CHANNELS),
    "rows": (ANY, CHANNELS),
    "first_rows": (ANY, CHANNELS),
    "log2_histogram": (CHANNELS, ANY),
    "token_histogram": (ANY,),
    "top_tokens": (ANY, ANY),
}
WHOLE = ("count_large", "count_huge", "log2_histogram", "token_histogram")


def input_stats(values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> InputStats:
    """The statistics of one group; StatsError when a tensor is not one of them or lacks the shape of its field."""
    name, width = values["name"], values["sites"][0]["in_features"] if values["sites"] else 0
    known = {field.name for field in fields(InputStats)} - {"tokens", "sequences"}
    for field, value in tensors.items():
        sizes = SHAPES.get(field, (CHANNELS,))
        fits = len(sizes) == value.ndim and all(
            size is ANY or length == width for size, length in zip(sizes, value.shape, strict=True)
        )
        numbers = value.is_floating_point() or field in WHOLE
        if field not in known or not fits or not numbers:
            raise StatsError(
                f"the statistics of {brief(name)} hold {brief(field)} as {value.dtype} {list(value.shape)}, "
                f"for an input of {width} channels",
                hint="calibrate again",
            )
    return InputStats(values.get("tokens", 0), values.get("sequences", 0), **tensors)


def value_of(kind: type[T], tensors: Mapping[str, torch.Tensor], **others: Any) -> T:
    """A dataclass of tensors, with the shapes of its fields; StatsError when one is missing or none of its fields."""
    try:
        return kind(**tensors, **others)
    except TypeError as error:
        raise StatsError(f"the statistics do not fit {kind.__name__}: {error}", hint="calibrate again") from error
