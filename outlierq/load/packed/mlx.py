"""MLX checkpoints (`quantization: {bits, group_size}`) and transformers' `metal` ones: affine codes in uint32 words.

`weight` uint32 [out, in * bits / 32]: codes of a row as one string of bits, lowest first. `scales` and `biases`
(`qbiases` in metal) [out, in / group_size]: weight = scale * code + bias, computed in float32 as transformers does it.
Embeddings and the head may be stored so, too. A module may have numbers of its own in the description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.load.packed.codes.bits import unpack
from outlierq.load.packed.codes.numbers import as_array, as_floats
from outlierq.load.packed.decoded import DecodedCheckpoint, checked_scales
from outlierq.load.packed.described import check_member, nothing_packed
from outlierq.load.packed.reading import presents

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.load.packed.codes.numbers import Parts

SCALES, BIASES = ".scales", ("biases", "qbiases")
WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class AffineLinear(StoredLinear):
    """How one weight is stored."""

    bits: int


class AffineCheckpoint(DecodedCheckpoint):
    """An MLX checkpoint presented as a plain one."""

    linears: dict[str, AffineLinear]

    def decoded(self, name: str) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        import torch

        linear, parts = self.linears[name], self.parts(name)
        weight = _times(linear, parts, as_floats(parts["scales"]))
        grouped = weight.reshape(*parts["biases"].shape, -1)
        grouped += as_floats(parts["biases"])[..., None]
        return torch.from_numpy(weight)

    def check_scales(self, name: str) -> None:
        """SourceError when a scale or a bias is no finite number, or a scale 0 over codes that are not."""
        linear = self.linears[name]
        for role in ("biases", "scales"):
            values = self.original.read(linear.members[role])
            busy = role == "scales"
            checked_scales(
                name,
                values,
                lambda empty, busy=busy: _times(linear, self.parts(name), as_floats(empty) * busy),
                signed=True,
            )

    def quantized(self, name: str) -> QuantTensor:
        """SourceError: its biases are no multiples of its scales."""
        raise SourceError(f"{name} of {self.source} has biases beside its scales, not zero points")


def _times(linear: AffineLinear, parts: Parts, scale: np.ndarray) -> np.ndarray:
    """Float32 [out, in]: codes times these scales [out, groups]."""
    import numpy as np

    rows, columns = linear.shape
    words = np.ascontiguousarray(as_array(parts["weight"])).view(np.int32)
    codes = unpack(words, linear.bits, columns).astype(np.float32).reshape(rows, scale.shape[1], -1)
    codes *= scale[..., None]
    return codes.reshape(rows, columns)


@presents("mlx")
@presents("metal")
def affine_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> AffineCheckpoint:
    """The presentation of an MLX folder. config: its description. SourceError for numbers that are not affine."""
    if config.get("mode", "affine") != "affine":
        raise SourceError(
            f"{stored.source} is an MLX checkpoint of the mode {config['mode']}", hint="affine ones are decoded here"
        )
    modules = [name.removesuffix(SCALES) for name in stored.tensors if name.endswith(SCALES)]
    if not modules:
        raise nothing_packed(stored)
    return AffineCheckpoint(stored, {f"{module}.weight": _linear(stored, config, module) for module in modules})


def _linear(stored: Checkpoint, config: Mapping[str, Any], module: str) -> AffineLinear:
    """How one weight is stored. SourceError for lost parts and shapes that contradict the description."""
    own = config.get(module)
    said = {**config, **(own if isinstance(own, Mapping) else {})}
    bits, size = said.get("bits"), said.get("group_size")
    if bits not in WIDTHS or not isinstance(size, int) or size < 1:
        raise SourceError(f"{stored.source} says {bits} bits in groups of {size} of {module}")
    biases = next((f"{module}.{end}" for end in BIASES if f"{module}.{end}" in stored.tensors), f"{module}.biases")
    members = {"weight": f"{module}.weight", "scales": f"{module}{SCALES}", "biases": biases}
    for role, member in members.items():
        if member not in stored.tensors:
            raise SourceError(f"{stored.source} is mixed: it has no {member}", hint="get the file again")
        check_member(stored.tensors[member], "mlx weight" if role == "weight" else "scales")
    shapes = {role: stored.tensors[member].shape for role, member in members.items()}
    rows, groups = shapes["scales"]
    columns = groups * size
    if shapes["biases"] != shapes["scales"] or shapes["weight"] != (rows, columns * bits // 32) or columns * bits % 32:
        raise SourceError(
            f"{module} has words {list(shapes['weight'])}, scales {list(shapes['scales'])} and biases "
            f"{list(shapes['biases'])}, which are not {bits} bits in groups of {size}"
        )
    return AffineLinear((rows, columns), members, bits=bits)
