"""What a checkpoint says of its compression: where it stands, and that its types are right before it is believed.

Only what the decoders read is described; other keys are let through as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import LARGEST_JSON, brief, json_object
from outlierq.core.model import DerivedCheckpoint, TensorInfo

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# Keys of config.json, and of the text model's section in it; MLX writes `quantization`.
KEYS = ("quantization_config", "compression_config", "quantization")
# Where ModelOpt keeps it, and in older versions nowhere else.
MODELOPT_FILE = "hf_quant_config.json"
# What other programs say about the stored format in files of their own: of no use to a checkpoint in another one.
STALE_FILES = ("quantize_config.json", "quant_config.json", MODELOPT_FILE)

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
    load_in_8bit: bool | None = None
    load_in_4bit: bool | None = None
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None


class _Fp8(_Part):
    activation_scheme: str | None = None
    weight_block_size: Annotated[list[Size], Len(2, 2)] | None = None
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None


class _Modelopt(_Part):
    quant_algo: str | None = None
    group_size: GroupSize | None = None
    ignore: list[str] | None = None


class _AutoRound(_GptqPart):
    packing_format: str | None = None
    data_type: str | None = None
    extra_config: dict[str, _GptqPart | None] | None = None


class _Affine(_Part):
    bits: int | None = None
    group_size: GroupSize | None = None
    mode: str | None = None


FLOATS, WHOLE, CODES = ("F32", "F16", "BF16"), ("I32", "I64"), ("I8", "U8", "F8_E4M3")
# What a stored part of a linear may be: its dtypes, and its least and most dimensions.
ROLES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "weight": (CODES, 2, 2),
    "weight_packed": (("I32",), 2, 2),
    "weight_pairs": (("U8",), 2, 2),
    "weight_scale": (FLOATS, 0, 2),
    "weight_zero_point": (("I32",), 2, 2),
    "weight_packed of 4-bit floats": (("U8",), 2, 2),
    "weight_scale of nvfp4": (("F8_E4M3",), 2, 2),
    "weight_scale of mxfp4": (("U8",), 2, 2),
    "weight_global_scale": (("F32",), 0, 1),
    "weight_shape": (WHOLE, 1, 1),
    "weight_g_idx": (WHOLE, 1, 1),
    "input_scale": (FLOATS, 0, 1),
    "input_global_scale": (("F32",), 0, 1),
    "qweight": (("I32",), 2, 2),
    "qzeros": (("I32",), 2, 2),
    "scales": (FLOATS, 2, 2),
    "g_idx": (WHOLE, 1, 1),
    "blocks of mxfp4": (("U8",), 4, 4),
    "scales of mxfp4": (("U8",), 3, 3),
    "mlx weight": (("U32",), 2, 2),
    "quant_state": (("U8",), 1, 1),
    "weight of 4 bits": (("U8",), 1, 2),
    "absmax of 4 bits": (("F32",), 1, 1),
    "absmax in bytes": (("U8",), 1, 1),
    "quant_map of 4 bits": (("F32",), 1, 1),
    "nested_absmax of 4 bits": (("F32",), 1, 1),
    "nested_quant_map of 4 bits": (("F32",), 1, 1),
    "fp8 weight": (("F8_E4M3",), 2, 3),
    "fp8 scale": ((*FLOATS, "F8_E8M0", "U8"), 0, 3),
    "SCB": (("F32",), 1, 1),
    "weight_format": (("U8", *WHOLE), 0, 1),
    "outlier_columns": (WHOLE, 1, 1),
    "outlier_weight": (FLOATS, 2, 2),
    "k_scale": (FLOATS, 0, 3),
    "v_scale": (FLOATS, 0, 3),
}
MAY_BE_EMPTY = ("outlier_columns", "outlier_weight")
SINGLE = ("weight_format", "weight_global_scale")


def check_member(info: TensorInfo, role: str) -> None:
    """SourceError when a stored part of a linear has a dtype or a number of dimensions that its role does not have."""
    dtypes, least, most = ROLES[role]
    single = role in SINGLE and prod(info.shape) != 1
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
    "fp8": _Fp8,
    "fbgemm_fp8": _Fp8,
    "mxfp4": _Fp8,
    "modelopt": _Modelopt,
    "modelopt_fp4": _Modelopt,
    "auto-round": _AutoRound,
    "intel/auto-round": _AutoRound,
    "mlx": _Affine,
    "metal": _Affine,
}


def described(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the checkpoint says of its compression, with a quant_method where one can be told; None for a plain one.

    It stands in config.json, in the section of the text model, or in ModelOpt's own file. SourceError when it is no
    object with settings.
    """
    inner = checkpoint.config.get("text_config")
    for place in (checkpoint.config, inner if isinstance(inner, Mapping) else {}):
        for key in KEYS:
            if place.get(key):
                return _with_method(checkpoint.source, place[key])
    return _of_modelopt(checkpoint)


def nothing_packed(stored: Checkpoint) -> SourceError:
    """The refusal of a checkpoint that calls itself compressed and is not."""
    method = (described(stored) or {}).get("quant_method")
    return SourceError(
        f"{stored.source} says that it is compressed with {method}, but holds no compressed weight",
        hint="if its weights are plain, remove the description of the compression from config.json",
    )


def without_description(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model, uncompressed."""
    plain = {key: value for key, value in config.items() if key not in KEYS}
    inner = plain.get("text_config")
    if isinstance(inner, Mapping):
        plain["text_config"] = {key: value for key, value in inner.items() if key not in KEYS}
    return plain


def _with_method(source: str, said: Any) -> dict[str, Any]:
    """The settings; MLX names no method, but has its two numbers alone."""
    if not isinstance(said, Mapping):
        raise SourceError(f"the quantization_config of {source} is {brief(said)}, not an object")
    is_mlx = "quant_method" not in said and {"bits", "group_size"} <= said.keys()
    return {**said, "quant_method": "mlx"} if is_mlx else dict(said)


def _of_modelopt(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What ModelOpt's file says, under the keys that it writes into config.json in later versions."""
    path = checkpoint.path / MODELOPT_FILE
    if isinstance(checkpoint, DerivedCheckpoint) or not path.is_file() or path.stat().st_size > LARGEST_JSON:
        return None
    said = json_object(path.read_bytes(), MODELOPT_FILE, SourceError).get("quantization")
    if not isinstance(said, Mapping) or not said.get("quant_algo"):
        return None
    return {**said, "quant_method": "modelopt", "ignore": said.get("exclude_modules")}


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


def check_not_mixed(plain: Checkpoint, config: Mapping[str, Any]) -> None:
    """SourceError when a weight is stored plain, though it is compressed in other blocks and nothing says otherwise,
    and when it is codes without scales. plain: the decoded checkpoint.

    Then the file, or its config.json, is not what was written.
    """
    kinds = {_kind(name) for name in plain.packed}
    for name, info in plain.tensors.items():
        if name in plain.packed or not name.endswith(".weight") or len(info.shape) != 2:
            continue
        if info.dtype not in (*FLOATS, "F64"):
            raise SourceError(
                f"{plain.source} is mixed: {name} is stored as {info.dtype} {list(info.shape)}, without its scales",
                hint="get the file again; without its scales nobody knows what the weight is",
            )
        module = name.removesuffix(".weight")
        if _kind(name) in kinds and not is_excluded(config, module):
            raise SourceError(
                f"{plain.source} is mixed: {name} is stored plain, but the same weight of other blocks is compressed, "
                "and its quantization_config does not leave it out",
                hint=f"if it is meant, {_way_out(config, module)}; else get the file again",
            )


def _way_out(config: Mapping[str, Any], module: str) -> str:
    """How a quantization_config says that a module is plain."""
    method = str(config.get("quant_method"))
    if method == "gptq":
        return f'add "-:{module}": {{}} to `dynamic` of the quantization_config'
    if method == "mlx":
        return f'add "{module}": false to the quantization_config'
    return f"add {module} to {EXCLUDED_BY.get(method, SKIPPED)} of the quantization_config"


def _kind(name: str) -> str:
    """A name without the numbers of blocks and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# The key that lists what stays plain, by method.
SKIPPED = "modules_to_not_convert"
EXCLUDED_BY = {
    "compressed-tensors": "ignore",
    "modelopt": "ignore",
    "modelopt_fp4": "ignore",
    "bitsandbytes": "llm_int8_skip_modules",
}


def is_excluded(config: Mapping[str, Any], module: str) -> bool:
    """Whether a quantization_config says that a module is not compressed, by the rules of its method."""
    method = str(config.get("quant_method"))
    if method == "gptq":
        return _is_outside(config, module)
    own = (config if method == "mlx" else config.get("extra_config") or {}).get(module)
    if own is False or (isinstance(own, Mapping) and own.get("bits", 0) >= 16):
        return True
    keys = (EXCLUDED_BY.get(method, SKIPPED), SKIPPED, "ignored_layers")
    entries = next((config[key] for key in keys if config.get(key)), [])
    rule = RULES.get(method, _names_by_pattern)
    return any(isinstance(entry, str) and rule(entry, module) for entry in entries)


def _is_outside(config: Mapping[str, Any], module: str) -> bool:
    """GPTQ: named by a negative pattern, or not among the modules of a block that were quantized."""
    negative = [key.removeprefix("-:") for key in config.get("dynamic") or {} if key.startswith("-:")]
    inside = config.get("modules_in_block_to_quantize")
    named = [name for part in inside or [] for name in (part if isinstance(part, list) else [part])]
    return any(fits(pattern, module) for pattern in negative) or bool(
        named and not any(module.endswith(str(name)) for name in named)
    )


def _names_exactly(entry: str, module: str) -> bool:
    """compressed-tensors: a name, or a pattern after "re:"; also a name that says more or less of the model's path."""
    if entry.startswith("re:"):
        return fits(entry.removeprefix("re:"), module)
    return entry == module or module.endswith(f".{entry}") or entry.endswith(f".{_below_model(module)}")


def _below_model(module: str) -> str:
    """A name from its list of blocks on: what comes before differs between programs."""
    found = re.search(r"\w+\.\d+\..*", module)
    return found[0] if found else module


def _names_by_pattern(entry: str, module: str) -> bool:
    """transformers: a pattern at the beginning that ends with a whole part of the name, or an ending."""
    return module.endswith(entry) or fits(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)


def _names_by_part(entry: str, module: str) -> bool:
    """AutoAWQ: any part of the name."""
    return entry in module


def _names_by_glob(entry: str, module: str) -> bool:
    """ModelOpt: a glob for the name, or the name of something around the module."""
    return fnmatchcase(module, entry) or module.startswith(f"{entry}.")


RULES: dict[str, Callable[[str, str], bool]] = {
    "compressed-tensors": _names_exactly,
    "modelopt": _names_by_glob,
    "modelopt_fp4": _names_by_glob,
    "awq": _names_by_part,
    "bitsandbytes": _names_by_part,
}
