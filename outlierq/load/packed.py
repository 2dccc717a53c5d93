"""An already compressed checkpoint seen as a plain one: packed weights are decoded when they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.model import CarriedFile, TensorInfo
from outlierq.load.decoders import decode_pack_quantized
from outlierq.load.shards import lookup

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

PACKED = ".weight_packed"

# Everything that pack-quantized stores for one weight.
MEMBERS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

# Rotations at these places are already inside the stored weights; others would have to run with the model.
FUSED = ("weight_input", "weight_output")


@dataclass(frozen=True)
class PackedWeight:
    """How one weight is stored. shape: (out, in). members: stored tensor names by role."""

    shape: tuple[int, int]
    bits: int
    symmetric: bool
    group_size: int | None
    members: dict[str, str]


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when it is plain; otherwise the same checkpoint with packed weights decoded to float32.

    SourceError when the compression is not compressed-tensors `pack-quantized` of weights alone.
    """
    found = checkpoint.config.get("quantization_config")
    if not found:
        return checkpoint
    _check_method(checkpoint, found)
    modules = [name.removesuffix(PACKED) for name in checkpoint.tensors if name.endswith(PACKED)]
    if not modules:
        raise SourceError(f"{checkpoint.source} says pack-quantized, but holds no packed weight")
    shapes = _shapes(checkpoint, modules)
    return UnpackedCheckpoint(checkpoint, {f"{m}.weight": _packed(checkpoint, found, m, shapes[m]) for m in modules})


class UnpackedCheckpoint:
    """A checkpoint whose packed weights are presented as float32 tensors. Satisfies `Checkpoint`."""

    def __init__(self, packed: Checkpoint, weights: dict[str, PackedWeight]):
        self._packed, self._weights = packed, weights
        self.source, self.kind, self.dtype = packed.source, packed.kind, packed.dtype
        self.path, self.revision = packed.path, packed.revision
        self.config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
        members = {name for weight in weights.values() for name in weight.members.values()}
        self.tensors: dict[str, TensorInfo] = {
            name: info for name, info in packed.tensors.items() if name not in members
        }
        for name, weight in weights.items():
            rows, columns = weight.shape
            self.tensors[name] = TensorInfo(name, "F32", weight.shape, rows * columns * 4)

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """The files of the packed checkpoint."""
        return self._packed.files

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the packed checkpoint."""
        return self._packed.fingerprint

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, or decoded to float32."""
        import torch

        lookup(self.tensors, name)
        if name not in self._weights:
            return self._packed.read(name)
        weight = self._weights[name]
        parts = {role: self._packed.read(stored) for role, stored in weight.members.items() if role != "weight_shape"}
        return torch.from_numpy(
            decode_pack_quantized(
                parts["weight_packed"],
                parts["weight_scale"],
                None if weight.symmetric else parts["weight_zero_point"],
                weight.shape,
                weight.bits,
                group_size=weight.group_size,
                group_index=parts.get("weight_g_idx"),
            )
        )

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors."""
        return {name: self.read(name) for name in names}


def _check_method(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Refuse what could not be evaluated faithfully, in one message."""
    method = config.get("quant_method")
    groups = _groups(config)
    faults = []
    if method != "compressed-tensors":
        raise SourceError(
            f"{checkpoint.source} is compressed with {method}, which is not decoded here",
            hint="compressed-tensors pack-quantized is; evaluate other formats with their own runtime",
        )
    formats = sorted({group.get("format") or config.get("format") or "none" for group in groups})
    if formats != ["pack-quantized"]:
        faults.append(f"format {', '.join(formats) or 'none'}")
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        faults.append("quantized activations")
    if config.get("kv_cache_scheme"):
        faults.append("a quantized KV cache")
    if _online_transforms(config):
        faults.append("rotations that run with the model")
    if faults:
        raise SourceError(
            f"{checkpoint.source} cannot be decoded to a plain model: it has {' and '.join(faults)}",
            hint="evaluate it with a runtime that executes it, e.g. vLLM",
        )


def _groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config groups, in their order."""
    return list((config.get("config_groups") or {}).values())


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
    return {names[name]: tuple(value.tolist()) for name, value in checkpoint.read_many(names).items()}


def _packed(checkpoint: Checkpoint, config: dict[str, Any], module: str, shape: tuple[int, int]) -> PackedWeight:
    """How one module's weight is stored, after its config group."""
    weights = _group_of(checkpoint, config, module)["weights"]
    stored = {role: f"{module}.{role}" for role in MEMBERS}
    members = {role: name for role, name in stored.items() if name in checkpoint.tensors}
    needed = ["weight_scale"] + ([] if weights.get("symmetric", True) else ["weight_zero_point"])
    for role in needed:
        if role not in members:
            raise SourceError(f"{checkpoint.source} has no {module}.{role}")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    return PackedWeight(shape, weights["num_bits"], weights.get("symmetric", True), size, members)


def _group_of(checkpoint: Checkpoint, config: dict[str, Any], module: str) -> dict[str, Any]:
    """The config group of a module: one that names it wins over one that names its class."""
    by_class = None
    for group in _groups(config):
        for target in group.get("targets", []):
            pattern = target.removeprefix("re:") if target.startswith("re:") else None
            if (pattern and re.match(pattern, module)) or target == module:
                return group
            if pattern is None and "." not in target:
                by_class = by_class or group
    if by_class is None:
        raise SourceError(f"{checkpoint.source} holds a packed {module}, but no config group targets it")
    return by_class
