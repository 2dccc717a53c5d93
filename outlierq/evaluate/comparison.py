"""Two checkpoints side by side: size, bits per weight, and what happened to each tensor. Headers only.

A quantized weight is stored as several tensors (codes, scales, zero points, ...). They are taken together as one
logical tensor under the name of the weight, so that a packed checkpoint can be compared with its source.
A checkpoint that can be decoded is asked; of another one compressed-tensors, GPTQ and AWQ layouts are understood, and
every unpacked one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.report import Shown
from outlierq.evaluate.divergence import Divergence

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint, TensorInfo

# Names a quantized weight may have, and the tensors that may accompany it (formats: compressed-tensors; GPTQ and AWQ).
CODES = ("weight_packed", "weight_pairs", "qweight", "weight")
COMPANIONS = frozenset(
    {"weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"}
    | {"input_scale", "input_zero_point", "input_global_scale"}
    | {"scales", "qzeros", "g_idx"}
    | {"SCB", "weight_format", "outlier_columns", "outlier_weight"}
)


@dataclass(frozen=True)
class LogicalTensor:
    """One parameter tensor however it is stored. parameters: logical elements. nbytes: with all its companions.

    stored: tensor name's last part, dtype and shape of the main stored tensor; equal when the storage is the same.
    """

    name: str
    parameters: int
    nbytes: int
    quantized: bool
    stored: tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class CheckpointSize:
    """How large a checkpoint is. nbytes: of all tensors. parameters: logical; bits_per_weight is their ratio.

    quantized_*: the same over the quantized weights; bits None when there are none.
    """

    nbytes: int
    parameters: int
    bits_per_weight: float
    quantized_parameters: int
    quantized_bits_per_weight: float | None


@dataclass(frozen=True)
class Comparison(Shown):
    """`b` relative to `a`. added, removed, changed: logical tensor names; changed means stored in another way.

    divergence: of `b` from `a` on a text, where it was measured.
    """

    a: CheckpointSize
    b: CheckpointSize
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: int
    divergence: Divergence | None = None

    @property
    def size_ratio(self) -> float:
        """Bytes of `a` over bytes of `b`: 4.0 is a quarter of the size."""
        return self.a.nbytes / self.b.nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        names = {name: list(getattr(self, name)) for name in ("added", "removed", "changed")}
        values = {**asdict(self), **names}
        return {key: value for key, value in values.items() if key != "divergence" or value is not None}


def compare_checkpoints(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Sizes of both and the tensors that were added, removed or stored in another way.

    Reads nothing but the tiny `weight_shape` tensors of packed weights; whether values differ is not looked at.
    """
    before, after = logical_tensors(a), logical_tensors(b)
    shared = before.keys() & after.keys()
    changed = tuple(sorted(name for name in shared if before[name].stored != after[name].stored))
    return Comparison(
        a=measure_size(before),
        b=measure_size(after),
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=changed,
        unchanged=len(shared) - len(changed),
    )


def measure_size(tensors: Mapping[str, LogicalTensor]) -> CheckpointSize:
    """Sums over logical tensors; SourceError when there is not one parameter."""
    nbytes = sum(t.nbytes for t in tensors.values())
    parameters = sum(t.parameters for t in tensors.values())
    if parameters == 0:
        raise SourceError("the checkpoint holds no parameters")
    quantized = [t for t in tensors.values() if t.quantized]
    quantized_parameters = sum(t.parameters for t in quantized)
    quantized_bits = 8 * sum(t.nbytes for t in quantized) / quantized_parameters if quantized_parameters else None
    return CheckpointSize(nbytes, parameters, 8 * nbytes / parameters, quantized_parameters, quantized_bits)


def logical_tensors(checkpoint: Checkpoint) -> dict[str, LogicalTensor]:
    """Every parameter tensor of a checkpoint by its unpacked name, companions folded into their weight.

    Of a checkpoint that is presented as a plain one it is known which they are; of others their names tell.
    """
    if any(len(checkpoint.stored_parts(name)) > 1 for name in checkpoint.packed):
        return {name: _presented(checkpoint, info) for name, info in checkpoint.tensors.items()}
    owners = {_split(name)[0]: name for name in checkpoint.tensors if _split(name)[1] in CODES}
    companions: dict[str, list[TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        module, part = _split(name)
        if part in COMPANIONS and module in owners:
            companions.setdefault(owners[module], []).append(info)
    counted = {info.name for infos in companions.values() for info in infos}
    tensors = (
        _logical_tensor(checkpoint, info, companions.get(name, []))
        for name, info in checkpoint.tensors.items()
        if name not in counted
    )
    return {tensor.name: tensor for tensor in tensors}


def _presented(checkpoint: Checkpoint, info: TensorInfo) -> LogicalTensor:
    """The logical tensor of one that is presented as a plain one."""
    parts = checkpoint.stored_parts(info.name)
    return LogicalTensor(
        name=info.name,
        parameters=math.prod(info.shape),
        nbytes=sum(part.nbytes for part in parts),
        quantized=info.name in checkpoint.packed,
        stored=(_split(parts[0].name)[1], parts[0].dtype, parts[0].shape),
    )


def _logical_tensor(checkpoint: Checkpoint, info: TensorInfo, companions: list[TensorInfo]) -> LogicalTensor:
    """The logical tensor of one main stored tensor."""
    module, part = _split(info.name)
    return LogicalTensor(
        name=f"{module}.weight" if part in CODES else info.name,
        parameters=_count_parameters(checkpoint, info),
        nbytes=info.nbytes + sum(c.nbytes for c in companions),
        quantized=bool(companions),
        stored=(part, info.dtype, info.shape),
    )


def _count_parameters(checkpoint: Checkpoint, info: TensorInfo) -> int:
    """Logical elements: from `weight_shape` when there is one, else from the bits of a code."""
    module, part = _split(info.name)
    elements = math.prod(info.shape)
    if part == "weight_packed":
        shape = f"{module}.weight_shape"
        if shape in checkpoint.tensors:
            return math.prod(checkpoint.read(shape).tolist())
    if part in ("weight_packed", "weight_pairs") and info.dtype == "U8":  # FP4, and OliVe's pairs: two codes a byte
        return 2 * elements
    if part in ("weight_packed", "qweight"):
        return info.nbytes * 8 // _code_bits(checkpoint, info.name)
    return elements


def _code_bits(checkpoint: Checkpoint, name: str) -> int:
    """Bits of a packed code according to the `quantization_config` of GPTQ and AWQ files."""
    bits = checkpoint.config.get("quantization_config", {}).get("bits")
    if not isinstance(bits, int):
        raise SourceError(
            f"cannot tell how many weights `{name}` holds: no weight_shape, and no bits in quantization_config"
        )
    return bits


def _split(name: str) -> tuple[str, str]:
    """("model.layers.0.mlp.up_proj", "weight")."""
    module, _, part = name.rpartition(".")
    return module, part
