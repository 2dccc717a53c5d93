"""The quantization_config of a checkpoint, checked for types before any of it is believed.

Only what the decoders read is described; other keys are let through as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief
from outlierq.core.model import TensorInfo

Size = Annotated[int, Field(ge=1, le=1 << 31)]
GroupSize = Annotated[int, Field(ge=-1, le=1 << 31)]
SECONDS_PER_PATTERN = 0.3


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Weights(_Part):
    num_bits: int | None = None
    type: str | None = None
    symmetric: bool = True
    strategy: str | None = None
    group_size: GroupSize | None = None
    block_structure: Annotated[list[Size], Len(2, 2)] | None = None


class _Inputs(_Part):
    num_bits: int | None = None
    type: str | None = None
    symmetric: bool = True
    strategy: str | None = None
    dynamic: bool | str | None = None
    group_size: Size | None = None


class _Group(_Part):
    targets: list[str] = []
    weights: _Weights | None = None
    input_activations: _Inputs | None = None
    format: str | None = None


class _Step(_Part):
    location: str | None = None


class _Rotation(_Part):
    apply: list[_Step] = []


class _Rotations(_Part):
    config_groups: dict[str, _Rotation] | None = None


class _CompressedTensors(_Part):
    format: str | None = None
    config_groups: dict[str, _Group] | None = None
    ignore: list[str] | None = None
    kv_cache_scheme: _Inputs | None = None
    transform_config: _Rotations | None = None


class _GptqPart(_Part):
    bits: int | None = None
    group_size: GroupSize | None = None


class _Gptq(_GptqPart):
    checkpoint_format: str | None = None
    format: str | None = None
    dynamic: dict[str, _GptqPart | None] | None = None


class _Awq(_Part):
    bits: int | None = None
    w_bit: int | None = None
    group_size: GroupSize | None = None
    q_group_size: GroupSize | None = None


class _Bitsandbytes(_Part):
    llm_int8_threshold: float = 6.0


FLOATS, WHOLE, CODES = ("F32", "F16", "BF16"), ("I32", "I64"), ("I8", "U8", "F8_E4M3")
# What a stored part of a linear may be: its dtypes, and its least and most dimensions.
ROLES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "weight": (CODES, 2, 2),
    "weight_packed": (("I32",), 2, 2),
    "weight_scale": (FLOATS, 0, 2),
    "weight_zero_point": (("I32",), 2, 2),
    "weight_packed of 4-bit floats": (("U8",), 2, 2),
    "weight_scale of nvfp4": (("F8_E4M3",), 2, 2),
    "weight_scale of mxfp4": (("U8",), 2, 2),
    "weight_global_scale": (("F32",), 0, 1),
    "weight_shape": (WHOLE, 1, 1),
    "weight_g_idx": (WHOLE, 1, 1),
    "input_scale": (FLOATS, 0, 1),
    "qweight": (("I32",), 2, 2),
    "qzeros": (("I32",), 2, 2),
    "scales": (FLOATS, 2, 2),
    "g_idx": (WHOLE, 1, 1),
    "SCB": (("F32",), 1, 1),
    "weight_format": (("U8", *WHOLE), 0, 1),
    "outlier_columns": (WHOLE, 1, 1),
    "outlier_weight": (FLOATS, 2, 2),
    "k_scale": (FLOATS, 0, 3),
    "v_scale": (FLOATS, 0, 3),
}
MAY_BE_EMPTY = ("outlier_columns", "outlier_weight")


def check_member(info: TensorInfo, role: str) -> None:
    """SourceError when a stored part of a linear has a dtype or a number of dimensions that its role does not have."""
    dtypes, least, most = ROLES[role]
    single = role == "weight_format" and prod(info.shape) != 1
    empty = 0 in info.shape and role not in MAY_BE_EMPTY
    if info.dtype not in dtypes or not least <= len(info.shape) <= most or empty or single:
        raise SourceError(
            f"{info.name} is {info.dtype} {list(info.shape)}; a {role} has {least} to {most} dimensions of "
            f"{' or '.join(dtypes)}"
        )


KINDS: dict[str, type[_Part]] = {
    "compressed-tensors": _CompressedTensors,
    "gptq": _Gptq,
    "awq": _Awq,
    "bitsandbytes": _Bitsandbytes,
}


def check_described(source: str, config: Any) -> None:
    """SourceError when a quantization_config holds something of another type than its format says."""
    if not isinstance(config, Mapping):
        raise SourceError(f"the quantization_config of {source} is {brief(config)}, not an object")
    kind = KINDS.get(str(config.get("quant_method")))
    if kind is None:
        return
    try:
        kind.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SourceError(
            f"the quantization_config of {source} is not valid at {brief(where)}: {first['msg']} "
            f"(this is {brief(first['input'])}; {error.error_count()} faults)"
        ) from None


def fits(pattern: str, name: str) -> bool:
    """Whether a regular expression from a checkpoint matches the beginning of a name.

    Python's own `re` may take longer than the age of the universe for a pattern of ten characters; the regex module
    can be told to stop. SourceError when the pattern is not valid or takes longer than that.
    """
    import regex

    try:
        return regex.match(pattern, name, timeout=SECONDS_PER_PATTERN) is not None
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise SourceError(f"the quantization_config has the pattern {brief(pattern)!r}, not valid: {error}") from error
    except TimeoutError as error:
        raise SourceError(f"the pattern {brief(pattern)!r} of the quantization_config takes without end") from error
