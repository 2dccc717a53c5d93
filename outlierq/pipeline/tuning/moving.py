"""What can be tuned of a stored checkpoint: tensors of real numbers, each with the parameter that it makes.

Everything moves relatively: a scale s to s (1 + c), a gain g to g (1 + c), also where 1 + w is stored, and a bias by c
times the typical size of its values. Codes and zero points stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from outlierq.core.errors import SourceError
from outlierq.core.model import Checkpoint, LinearSite, StudiedModel, as_matrix
from outlierq.pipeline.checking.plain import is_norm, offset_of

if TYPE_CHECKING:
    import torch

    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.scheme import QuantScheme

FLOATS = ("F32", "F16", "BF16")
SCALES = ("weight_scale", "scales", "scale")  # what formats call the member that holds them


@dataclass(frozen=True)
class MovingVector:
    """The gain of a norm, or a bias, [n]. name: of the stored tensor. slot: of the parameter. part: the name of its
    block, empty for what is outside of the blocks. offset: of a gain, what the class adds to it. unit: of a bias, the
    typical size of its values.
    """

    name: str
    slot: str
    part: str
    kind: Literal["norms", "biases"]
    values: torch.Tensor
    offset: float = 0.0
    unit: float = 0.0

    @property
    def start(self) -> torch.Tensor:
        """No change, [n]."""
        return self.values.new_zeros(self.values.shape).float()

    def applied(self, parameter: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The parameter [n] with a change [n]."""
        if self.kind == "biases":
            return parameter + self.unit * change
        return (parameter + self.offset) * (1 + change) - self.offset

    def gradient(self, now: torch.Tensor, gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """By the change [n], from that by the parameter as it is `now` [n]."""
        return gradient * (self.unit if self.kind == "biases" else (now + self.offset) / (1 + change))

    def stored(self, change: torch.Tensor) -> torch.Tensor:
        """The tensor [n] to be stored, rounded once."""
        return self.applied(self.values.float(), change).to(self.values.dtype)

    def left(self, change: torch.Tensor) -> torch.Tensor:
        """What is left of a change [n] once it is stored."""
        import torch

        before, after = self.values.float(), self.stored(change).float()
        base = torch.full_like(before, self.unit) if self.kind == "biases" else before + self.offset
        return torch.where(base == 0, 0.0, (after - before) / base)


@dataclass(frozen=True)
class MovingScale:
    """The scales of a packed weight, [rows, groups]. name: of the stored tensor. across: it is stored transposed."""

    name: str
    slot: str
    part: str
    site: LinearSite
    scheme: QuantScheme
    values: torch.Tensor
    across: bool

    @property
    def kind(self) -> str:
        """For what is said of it."""
        return "scales"

    @property
    def start(self) -> torch.Tensor:
        """No change, [rows, groups]."""
        return self._scale.new_zeros(self._scale.shape)

    @property
    def _scale(self) -> torch.Tensor:
        """The scales, float32 [rows, groups]."""
        shape = self.scheme.scale_shape(self.site.out_features, self.site.in_features)
        return (self.values.T if self.across else self.values.reshape(shape)).float()

    def applied(self, parameter: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The weight, in its stored shape, with scales that have changed by `change` [rows, groups]."""
        from outlierq.quantize.moving import spread

        factor = spread(1 + change, self.scheme, (self.site.out_features, self.site.in_features))
        return parameter * (factor.T if self.site.transposed else factor)

    def gradient(self, now: torch.Tensor, gradient: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """By the change [rows, groups], from that by the weight as it is `now`, in its stored shape."""
        from outlierq.quantize.moving import gathered

        return gathered(as_matrix(self.site, gradient * now), self.scheme, change.shape).div_(1 + change)

    def stored(self, change: torch.Tensor) -> torch.Tensor:
        """The tensor to be stored, in its own shape, rounded once."""
        scale = (self._scale * (1 + change)).to(self.values.dtype)
        return (scale.T if self.across else scale).reshape(self.values.shape).contiguous()

    def left(self, change: torch.Tensor) -> torch.Tensor:
        """What is left of a change [rows, groups] once it is stored."""
        import torch

        before = self._scale
        after = (before * (1 + change)).to(self.values.dtype).float()
        return torch.where(before == 0, 0.0, after / torch.where(before == 0, 1.0, before) - 1)


Moving = MovingScale | MovingVector


def moving_of(model: StudiedModel, kinds: frozenset[str]) -> tuple[dict[str, Moving], list[str]]:
    """Everything of some kinds ("scales", "norms", "biases") in the blocks, and behind them, that can move, by the name
    of its stored tensor; and sentences on what cannot. model: a packed checkpoint, decoded.
    """
    moving: dict[str, Moving] = {}
    left: Counter[str] = Counter()
    if "scales" in kinds:
        for block in model.structure.blocks:
            for site in (site for site in block.sites if site.weight in model.checkpoint.packed):
                scale = _scale_of(model, site, block.name)
                if isinstance(scale, str):
                    left[scale] += 1
                else:
                    moving[scale.name] = scale
    for vector in _vectors(model):
        if vector.kind in kinds:
            moving[vector.name] = vector
    return moving, [f"the scales of {count} weights stay as they are: {why}" for why, count in left.items()]


def _scale_of(model: StudiedModel, site: LinearSite, part: str) -> MovingScale | str:
    """The scales of a packed weight, or why they cannot move."""
    plain = model.checkpoint
    linear = plain.linears.get(site.weight)
    member = None if linear is None else next((linear.members[role] for role in SCALES if role in linear.members), None)
    if linear is None or member is None:
        return "they are not stored one weight at a time"
    try:
        quantized = plain.quantized(site.weight)
    except SourceError as error:
        return error.what.removeprefix(f"{site.weight} of {plain.source} ")
    if quantized.scheme.scales != "plain" or quantized.scheme.kind == "codebook":
        return f"those of {quantized.scheme.numbers} are no real numbers"
    if quantized.outlier_columns is not None:
        return "some of their columns are kept in 16 bits"
    values = stored_of(plain).read(member)
    across = _lies_across(values, quantized)
    if across is None:
        return "there is one for a whole weight, or they are stored in another order"
    return MovingScale(member, f"{site.module}.weight", part, site, quantized.scheme, values, across)


def stored_of(plain: Checkpoint) -> Checkpoint:
    """The checkpoint as its files have it, below what decodes it."""
    from outlierq.core.model import DerivedCheckpoint

    while isinstance(plain, DerivedCheckpoint):
        plain = plain.original
    return plain


def _lies_across(values: torch.Tensor, quantized: QuantTensor) -> bool | None:
    """Whether stored scales are [groups, rows]; None where they are not those of the weight in any order known."""
    import torch

    scale = quantized.scale
    if values.numel() != scale.numel() or values.numel() == 1 or not values.is_floating_point():
        return None
    if torch.equal(values.float().reshape(scale.shape), scale.float()):
        return False
    if values.dim() == 2 and values.T.shape == scale.shape and torch.equal(values.T.float(), scale.float()):
        return True
    return None


def _vectors(model: StudiedModel) -> Iterator[MovingVector]:
    """Gains and biases that one parameter is made of."""
    plain, uses = model.checkpoint, Counter(model.names.values())
    towers = tuple(f"{tower}." for tower in model.structure.towers)
    parameters: Mapping[str, torch.Tensor] = dict(model.skeleton.named_parameters())
    for slot, name in model.names.items():
        info = plain.tensors.get(name)
        is_vector = info is not None and len(info.shape) == 1 and info.dtype in FLOATS and uses[name] == 1
        is_own = is_vector and name not in plain.packed and slot in parameters and not slot.startswith(towers)
        if not is_own or name not in stored_of(plain).tensors:
            continue
        part = next((b.name for b in model.structure.blocks if slot.startswith(f"{b.name}.")), "")
        if slot.endswith(".weight") and is_norm(slot):
            norm = model.skeleton.get_submodule(slot.removesuffix(".weight"))
            yield MovingVector(name, slot, part, "norms", plain.read(name), offset=offset_of(norm))
        elif slot.endswith(".bias"):
            values = plain.read(name)
            yield MovingVector(name, slot, part, "biases", values, unit=float(values.float().square().mean().sqrt()))
