"""A compressed checkpoint presented as a plain one, whose weights are decoded when they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.model import DerivedCheckpoint, StoredLinear, TensorInfo
from outlierq.load.source.shards import lookup

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


class DecodedCheckpoint(DerivedCheckpoint):
    """A checkpoint whose compressed weights are presented as float32 tensors.

    linears: by the name of their weight. aside: stored tensors that the plain model does not have. Subclasses say how a
    linear is decoded.
    """

    def __init__(self, stored: Checkpoint, linears: Mapping[str, StoredLinear], aside: Iterable[str] = ()):
        super().__init__(stored)
        self.linears = dict(linears)
        self.config: dict[str, Any] = {k: value for k, value in stored.config.items() if k != "quantization_config"}
        members = {name for linear in self.linears.values() for name in linear.members.values()} | set(aside)
        self.tensors: dict[str, TensorInfo] = {n: info for n, info in stored.tensors.items() if n not in members}
        for name, linear in self.linears.items():
            self.tensors[name] = TensorInfo(name, "F32", linear.shape, linear.shape[0] * linear.shape[1] * 4)

    @abstractmethod
    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, or the weight of a linear decoded to float32 [out, in]."""
        lookup(self.tensors, name)
        return self.decoded(name) if name in self.linears else self.original.read(name)

    def parts(self, name: str, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The stored tensors of the linear with this weight, by role, but for some; each in the shape of its header."""
        members = self.linears[name].members
        return {role: self.original.read(stored) for role, stored in members.items() if role not in without}
