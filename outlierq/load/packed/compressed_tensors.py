"""An already compressed checkpoint seen as a plain one: packed weights are decoded when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.load.model.activations import input_scheme
from outlierq.load.model.attention import attention_names, round_cache, stored_prefix
from outlierq.load.packed.codes.across import decode_across
from outlierq.load.packed.codes.bits import decode_pack_quantized, pack_quantized_rows
from outlierq.load.packed.codes.byte_codes import decode_float_quantized, decode_int_quantized, decode_mxfp8, mxfp8_rows
from outlierq.load.packed.codes.e2m1 import check_nothing, check_small_scales, decode_e2m1, e2m1_rows
from outlierq.load.packed.decoded import DecodedCheckpoint, ServedLinear, checked_scales, without_codes
from outlierq.load.packed.described import check_member, fits, nothing_packed
from outlierq.load.packed.reading import presents

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint

SCALE, PACKED = ".weight_scale", ".weight_packed"
KEY_SCALE, VALUE_SCALE = ".k_scale", ".v_scale"

# Everything that a format stores for one weight and for its input. The first one holds the codes.
PACKED_MEMBERS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
BYTE_MEMBERS = ("weight", "weight_scale", "input_scale")
GLOBAL = "weight_global_scale"
NOT_OF_WEIGHTS = ("weight_shape", "input_scale", "input_global_scale")
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"
MEMBERS = {
    "pack-quantized": PACKED_MEMBERS,
    "int-quantized": BYTE_MEMBERS,
    "float-quantized": BYTE_MEMBERS,
    NVFP4: ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    MXFP4: ("weight_packed", "weight_scale"),
    MXFP6: ("weight_packed", "weight_scale"),
    MXFP8: ("weight", "weight_scale"),
}
SIGNS = {NVFP4: 0x88, MXFP4: 0x88, MXFP8: 0x80}  # bits of a byte that are signs of codes; six bits have theirs anywhere
SCALES = {NVFP4: "two-level", **dict.fromkeys((MXFP4, MXFP6, MXFP8), "power-of-two")}
# What their parts may be, where that is not what the other formats have under the same name.
FLOAT4_ROLES = {
    (NVFP4, "weight_packed"): "weight_packed of 4-bit floats",
    (MXFP4, "weight_packed"): "weight_packed of 4-bit floats",
    (MXFP6, "weight_packed"): "weight_packed of 4-bit floats",
    (NVFP4, "weight_scale"): "weight_scale of nvfp4",
    (MXFP4, "weight_scale"): "weight_scale of mxfp4",
    (MXFP6, "weight_scale"): "weight_scale of mxfp4",
    (MXFP8, "weight_scale"): "weight_scale of mxfp4",
}

# A target whose matrices are stored as [in, out].
CONV1D = "Conv1D"
# Rotations at these places are already inside the stored weights; others would have to run with the model.
FUSED = ("weight_input", "weight_output")


@dataclass(frozen=True)
class PackedWeight(ServedLinear):
    """How one weight is stored.

    group_size: columns that share a scale, None for a whole row. format: name of the compressed-tensors format. block:
    rows and columns that share a scale. said: its config group, as it stands in config.json. is_across: scales lie
    along columns, those of a Conv1D, whose matrix is stored as [in, out]: `block` rows share one, or all of a column.
    """

    bits: int
    group_size: int | None
    format: str = "pack-quantized"
    block: tuple[int, int] | None = None
    said: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    is_across: bool = field(default=False, kw_only=True)


@presents("compressed-tensors")
def compressed_tensors_checkpoint(checkpoint: Checkpoint, config: dict[str, Any]) -> UnpackedCheckpoint:
    """A compressed-tensors folder presented as a plain one. config: its quantization_config.

    SourceError when it cannot be decoded and run here.
    """
    _check_decodable(checkpoint, config)
    beyond = _beyond(config)
    ends = (SCALE, PACKED)
    modules = list(dict.fromkeys(n.rpartition(".")[0] for n in checkpoint.tensors if n.endswith(ends)))
    if not modules and _groups(config):
        raise nothing_packed(checkpoint)
    groups = {module: _group_of(checkpoint, config, module) for module in modules}
    packed = [m for m in modules if _format(groups[m], config) == "pack-quantized"]
    shapes = _shapes(checkpoint, packed)
    weights = {f"{m}.weight": _packed(checkpoint, config, m, groups[m], shapes.get(m)) for m in modules}
    return UnpackedCheckpoint(checkpoint, weights, _cache_scales(checkpoint, config), beyond)


class UnpackedCheckpoint(DecodedCheckpoint):
    """A checkpoint of compressed-tensors.

    cache: stored prefix of an attention module -> names of its scales for keys and values. beyond: what cannot be run
    here, though the weights can be decoded.
    """

    linears: dict[str, PackedWeight]

    def __init__(
        self,
        stored: Checkpoint,
        linears: dict[str, PackedWeight],
        cache: dict[str, tuple[str, str]],
        beyond: Sequence[str] = (),
    ):
        super().__init__(stored, linears, aside=[name for names in cache.values() for name in names])
        self._cache, self._beyond = cache, beyond

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""
        import torch

        return torch.from_numpy(_decode(self.linears[name], self.parts(name, NOT_OF_WEIGHTS)))

    def check_shapes(self, name: str) -> None:
        """SourceError when codes, scales or zero points have no shape that fits the weight, by their headers."""
        shapes = {r: self.original.tensors[member].shape for r, member in self.linears[name].members.items()}
        check_shapes(f"{name} of {self.source}", self.linears[name], shapes)

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no number, or 0 over codes that are not; where there is one for
        a few weights, when all are."""
        weight = self.linears[name]
        scale = self.original.read(weight.members["weight_scale"])
        if weight.format in SCALES:
            whole = self.original.read(weight.members[GLOBAL]) if GLOBAL in weight.members else None
            check_small_scales(scale, whole)
            if not bool(scale.float().any()):
                role = next(role for role in weight.members if role in ("weight", "weight_packed"))
                check_nothing(name, self.original.read(weight.members[role]), SIGNS.get(weight.format, 0))
            if whole is not None:
                checked_scales(name, scale.float(), without_codes, signed=True)
            return

        def decode(empty: torch.Tensor) -> np.ndarray:
            return _decode(weight, {**self.parts(name, NOT_OF_WEIGHTS), "weight_scale": empty})

        checked_scales(name, scale, decode, signed=weight.format != "float-quantized")

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in], scales and zero points of a weight. SourceError when they are not in groups of columns."""
        weight = self.linears[name]
        if "weight_g_idx" in weight.members:
            raise SourceError(f"{name} of {self.source} has its groups in activation order, not in runs of columns")
        if weight.is_across:
            raise SourceError(f"{name} of {self.source} is stored as [in, out]; its codes are read by rows only")
        parts, scheme = self.parts(name), self._scheme(weight)
        if weight.format == MXFP8:
            return mxfp8_rows(parts, scheme, weight.shape, 0, weight.shape[0])
        if weight.format in SCALES:
            return e2m1_rows(parts, scheme, weight.shape, 0, weight.shape[0])
        scale, scale_shape = parts["weight_scale"], scheme.scale_shape(*weight.shape)
        if scale.numel() == 1:
            parts["weight_scale"] = scale = scale.reshape(1, 1).expand(scale_shape).contiguous()
        if tuple(scale.shape) != scale_shape:
            raise SourceError(
                f"{name} of {self.source} has scales {list(scale.shape)}; {scheme} needs {list(scale_shape)}"
            )
        if weight.format == "pack-quantized":
            return pack_quantized_rows(parts, scheme, weight.shape, 0, weight.shape[0])
        return QuantTensor(parts["weight"], scale, None, scheme, parts.get("input_scale"))

    def code_scheme(self, name: str) -> QuantScheme | None:
        """The scheme of these codes; None where groups are no runs of columns, or inputs cannot be declared."""
        weight = self.linears[name]
        is_known = not (self._beyond or weight.is_across or "weight_g_idx" in weight.members)
        return self._scheme(weight) if is_known else None

    def _scheme(self, weight: PackedWeight) -> QuantScheme:
        """How a weight is stored."""
        stored = DTYPES[self.original.tensors[weight.members["weight_scale"]].dtype][0]
        return QuantScheme(
            weight.bits,
            weight.group_size,
            weight.symmetric,
            self.dtype if weight.format in SCALES else stored,
            kind="int" if weight.format in ("pack-quantized", "int-quantized") else "float",
            block=weight.block,
            activations=weight.inputs,
            scales=SCALES.get(weight.format, "plain"),
        )

    def install(self, model: torch.nn.Module, names: Mapping[str, str]) -> None:
        """Let a model with the decoded weights round inputs and cache as the checkpoint says.

        names: parameter -> stored tensor. SourceError when that cannot be run here, or the cache scales fit no
        attention module.
        """
        if self._beyond:
            raise _beyond_us(self.original, "run here as it is served", self._beyond)
        super().install(model, names)
        if self._cache:
            attention = {stored_prefix(name, names): name for name in attention_names(model)}
            lost = sorted(self._cache.keys() - attention.keys())
            if lost:
                raise SourceError(f"{self.source} has cache scales for {lost[0]}, which is no attention of the model")
            read = self.original.read
            round_cache(model, {attention[p]: (read(key), read(value)) for p, (key, value) in self._cache.items()})


def check_shapes(name: str, weight: PackedWeight, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """SourceError when a stored part of a weight does not fit its shape. shapes: of the parts, by role."""
    rows, columns = weight.shape
    codes, scales = shapes[MEMBERS[weight.format][0]], shapes["weight_scale"]
    words = {"weight": columns, "weight_packed": -(-columns * weight.bits // 32)}
    if weight.format not in SCALES and codes not in [(rows, words[r]) for r in words if r in shapes]:
        raise SourceError(f"{name} has codes {list(codes)} for {rows} x {columns} weights of {weight.bits} bits")
    if not _scales_fit(weight, scales):
        raise SourceError(f"{name} has scales {list(scales)}, which do not fit {rows} x {columns} weights")
    zeros = -(-rows * weight.bits // 32), max(1, prod(scales) // rows)
    if not weight.symmetric and shapes["weight_zero_point"] != zeros:
        stored = list(shapes["weight_zero_point"])
        raise SourceError(f"{name} has zero points {stored}; {rows} rows with scales {list(scales)} need {list(zeros)}")


def _scales_fit(weight: PackedWeight, scales: tuple[int, ...]) -> bool:
    """Whether scales of this shape belong to a weight: one, some for each row, or for each block."""
    rows, columns = weight.shape
    if weight.is_across:
        return scales == (-(-rows // (weight.block[0] if weight.block else rows)), columns)
    if weight.block is not None:
        return scales == (-(-rows // weight.block[0]), -(-columns // weight.block[1]))
    if weight.format in SCALES:
        return weight.group_size is not None and scales == (rows, columns // weight.group_size)
    if weight.group_size is not None and weight.format == "pack-quantized" and prod(scales) != 1:
        return prod(scales) == rows * -(-columns // weight.group_size)
    groups = prod(scales) // rows
    return prod(scales) == 1 or (groups * rows == prod(scales) and groups > 0 and columns % groups == 0)


def _decode(weight: PackedWeight, parts: dict[str, torch.Tensor]) -> np.ndarray:
    """Float32 [out, in] by the decoder of the format, [in, out] where it is stored so."""
    if weight.is_across:
        return decode_across(parts, weight.shape, weight.bits, weight.block and weight.block[0])
    if weight.format == MXFP8:
        return decode_mxfp8(parts["weight"], parts["weight_scale"])
    if weight.format in SCALES:
        small = (parts["weight_packed"], parts["weight_scale"], parts.get("weight_global_scale"))
        return decode_e2m1(*small, bits=weight.bits)
    if weight.format == "int-quantized":
        return decode_int_quantized(parts["weight"], parts["weight_scale"])
    if weight.format == "float-quantized":
        return decode_float_quantized(parts["weight"], parts["weight_scale"], block=weight.block)
    return decode_pack_quantized(
        parts["weight_packed"],
        parts["weight_scale"],
        None if weight.symmetric else parts["weight_zero_point"],
        weight.shape,
        weight.bits,
        group_size=weight.group_size,
        group_index=parts.get("weight_g_idx"),
    )


def _check_decodable(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Refuse weights that cannot be decoded, in one message."""
    faults = []
    groups = _groups(config)
    formats = sorted({_format(group, config) for group in groups} - MEMBERS.keys())
    if formats or not (groups or config.get("kv_cache_scheme")):
        faults.append(f"format {', '.join(formats) or 'none'}")
    if any(
        _format(g, config) != "pack-quantized" and not (g.get("weights") or {}).get("symmetric", True) for g in groups
    ):
        faults.append("unpacked weights with zero points")
    if _online_transforms(config):
        faults.append("rotations that run with the model")
    if faults:
        raise _beyond_us(checkpoint, "decoded to a plain model", faults)


def _beyond(config: dict[str, Any]) -> list[str]:
    """What could not be evaluated faithfully, though its weights can be decoded."""
    groups = _groups(config)
    inputs = [input_scheme(group.get("input_activations")) for group in groups]
    faults = sorted({fault for fault in inputs if isinstance(fault, str)})
    if any(group.get("output_activations") for group in groups):
        faults.append("quantized outputs")
    return faults + _cache_faults(config.get("kv_cache_scheme"))


def _beyond_us(checkpoint: Checkpoint, what: str, faults: Sequence[str]) -> SourceError:
    """Why something cannot be done with a checkpoint."""
    return SourceError(
        f"{checkpoint.source} cannot be {what}: it has {' and '.join(faults)}",
        hint="evaluate it with a runtime that executes it, e.g. vLLM",
    )


def _groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config groups, in their order."""
    return list((config.get("config_groups") or {}).values())


def _format(group: dict[str, Any], config: dict[str, Any]) -> str:
    """The format of a config group; its own wins over that of the whole checkpoint."""
    return group.get("format") or config.get("format") or "none"


def _cache_faults(cache: dict[str, Any] | None) -> list[str]:
    """Why the KV cache cannot be rounded here."""
    if not cache:
        return []
    known = cache.get("strategy") in ("tensor", "attn_head") and cache.get("symmetric", True)
    if known and (cache.get("num_bits"), cache.get("type"), bool(cache.get("dynamic"))) == (8, "float", False):
        return []
    return [f"a KV cache of {cache.get('num_bits')}-bit {cache.get('type')} numbers per {cache.get('strategy')}"]


def _cache_scales(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Stored prefix of each attention module -> names of its two scales; SourceError when one is missing."""
    if not config.get("kv_cache_scheme"):
        return {}
    prefixes = [name.removesuffix(KEY_SCALE) for name in checkpoint.tensors if name.endswith(KEY_SCALE)]
    lost = [f"{p}{VALUE_SCALE}" for p in prefixes if f"{p}{VALUE_SCALE}" not in checkpoint.tensors]
    if lost or not prefixes:
        raise SourceError(f"{checkpoint.source} has a quantized KV cache, but no {lost[0] if lost else 'k_scale'}")
    return {prefix: (f"{prefix}{KEY_SCALE}", f"{prefix}{VALUE_SCALE}") for prefix in prefixes}


def _online_transforms(config: dict[str, Any]) -> bool:
    """Whether any rotation must be executed at run time."""
    schemes = ((config.get("transform_config") or {}).get("config_groups") or {}).values()
    return any(step.get("location") not in FUSED for scheme in schemes for step in scheme.get("apply", []))


def _shapes(checkpoint: Checkpoint, modules: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of each packed module, from its `weight_shape` tensor."""
    lost = [module for module in modules if f"{module}.weight_shape" not in checkpoint.tensors]
    if lost:
        raise SourceError(f"{checkpoint.source} has no {lost[0]}.weight_shape ({len(lost)} such modules)")
    names = {f"{module}.weight_shape": module for module in modules}
    for name in names:
        check_member(checkpoint.tensors[name], "weight_shape")
    return {names[name]: tuple(value.tolist()) for name, value in checkpoint.read_many(names).items()}


def _packed(
    checkpoint: Checkpoint, config: dict[str, Any], module: str, group: dict[str, Any], shape: tuple[int, int] | None
) -> PackedWeight:
    """How one module's weight is stored, after its config group. shape: (out, in) where it is packed."""
    weights, layout = group.get("weights"), _format(group, config)
    if not weights or weights.get("num_bits") is None:
        raise SourceError(f"{checkpoint.source} holds a packed {module}, but its config group says nothing of weights")
    if weights.get("strategy") == "block" and not weights.get("block_structure"):
        raise SourceError(f"{checkpoint.source} has no block_structure for the blocks of {module}")
    inputs = _runnable(group)
    is_across, is_symmetric = CONV1D in group.get("targets", []), weights.get("symmetric", True)
    members = _members(checkpoint, module, layout, is_symmetric=is_symmetric, inputs=inputs)
    in_groups = weights.get("strategy") in ("group", "tensor_group")
    size = weights.get("group_size") if in_groups else None
    if in_groups and (size is None or size < 1):
        raise SourceError(f"{checkpoint.source} has groups of {size} columns for {module}")
    if layout in (NVFP4, MXFP4, MXFP6):
        rows, width = checkpoint.tensors[members["weight_packed"]].shape
        shape = rows, width * 8 // (6 if layout == MXFP6 else 4)
    shape = shape or checkpoint.tensors[members["weight"]].shape
    if len(shape) != 2 or min(shape) < 1:
        raise SourceError(f"{checkpoint.source} stores {module} with the shape {list(shape)}, not as a matrix")
    if is_across and not is_symmetric:
        raise SourceError(f"{checkpoint.source} has zero points for {module}, a {CONV1D}; these are not decoded here")
    block = tuple(weights["block_structure"]) if weights.get("strategy") == "block" else None
    return PackedWeight(
        shape,
        members,
        weights["num_bits"],
        size,
        layout,
        block,
        is_across=is_across,
        inputs=inputs,
        symmetric=is_symmetric,
        said=group,
    )


def _members(
    checkpoint: Checkpoint, module: str, layout: str, *, is_symmetric: bool, inputs: ActivationScheme | None
) -> dict[str, str]:
    """The stored tensors of one module by role. SourceError when one lacks, or is none of its role."""
    stored = {role: f"{module}.{role}" for role in MEMBERS[layout]}
    members = {role: name for role, name in stored.items() if name in checkpoint.tensors}
    needed = [MEMBERS[layout][0], "weight_scale"]
    needed += [] if is_symmetric else ["weight_zero_point"]
    needed += ["weight_global_scale"] if layout == NVFP4 else []
    if inputs is not None and not inputs.dynamic:
        needed += ["input_scale" if inputs.scales == "plain" else "input_global_scale"]
    for role in needed:
        if role not in members:
            raise SourceError(f"{checkpoint.source} has no {module}.{role}")
    for role, name in members.items():
        check_member(checkpoint.tensors[name], FLOAT4_ROLES.get((layout, role), role))
    return members


def _runnable(group: dict[str, Any]) -> ActivationScheme | None:
    """How inputs are rounded, where that can be run here."""
    inputs = input_scheme(group.get("input_activations"))
    return None if isinstance(inputs, str) else inputs


def _group_of(checkpoint: Checkpoint, config: dict[str, Any], module: str) -> dict[str, Any]:
    """The config group of a module: one that names it wins over one that names its class."""
    by_class = None
    for group in _groups(config):
        for target in group.get("targets", []):
            pattern = target.removeprefix("re:") if target.startswith("re:") else None
            if (pattern and fits(pattern, module)) or target == module:
                return group
            if pattern is None and "." not in target:
                by_class = by_class or group
    if by_class is None:
        raise SourceError(f"{checkpoint.source} holds a packed {module}, but no config group targets it")
    return by_class
