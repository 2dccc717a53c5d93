"""Parts of a model that get their weights when they run, and keep none: for learning, which needs each part often."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from outlierq.calibrate.runner import PartWeights
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.model import StudiedModel, TensorSource

if TYPE_CHECKING:
    import torch

# Bytes of decoded weights that stay in memory: a step needs every block twice, and decoding takes as long as running.
DECODED_BYTES = 2 << 30


class Remembered(TensorSource):
    """A checkpoint that keeps the tensors which it has read, up to DECODED_BYTES of them."""

    def __init__(self, source: TensorSource):
        self.source, self.dtype, self.tensors = source, source.dtype, source.tensors
        self._known: dict[str, torch.Tensor] = {}
        self._room = DECODED_BYTES

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the shape of its header; it is not to be written to."""
        if name in self._known:
            return self._known[name]
        tensor = self.source.read(name)
        if tensor.nbytes <= self._room:
            self._known[name] = tensor
            self._room -= tensor.nbytes
        return tensor

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors by name, each in the shape of its header."""
        return {name: self.read(name) for name in names}


class Parts:
    """Gives the parts of a model their weights. changed: is given the name of a part that has them now, and the part.

    dtype: of floating-point numbers. source: where they are read.
    """

    def __init__(
        self,
        model: StudiedModel,
        dtype: torch.dtype,
        device: str,
        source: TensorSource,
        changed: Callable[[str, torch.nn.Module], None] = lambda name, part: None,
    ):
        self.model, self.dtype, self.device = model, dtype, device
        self.source, self.changed = source, changed

    @property
    def weights(self) -> PartWeights:
        """For a runner."""
        return PartWeights(self._materialise, self._release)

    def _part(self, name: str) -> torch.nn.Module:
        return self.model.skeleton.get_submodule(name) if name else self.model.skeleton

    def _materialise(self, name: str) -> None:
        """Give a part its weights; for the empty name, what is outside of the blocks."""
        from outlierq.load import leave_empty, load_tensors_into

        part, towers = self._part(name), () if name else self.model.structure.towers
        skip = () if name else (*(block.name for block in self.model.structure.blocks), *towers)
        load_tensors_into(
            part, self.source, self.model.names, prefix=name, skip=skip, dtype=self.dtype, device=self.device
        )
        for tower in towers:
            leave_empty(self.model.skeleton.get_submodule(tower), dtype=self.dtype, device=self.device)
        self.changed(name, part)

    def _release(self, name: str) -> None:
        """Take the weights of a part again."""
        from outlierq.load import release

        release(self._part(name))
        return_freed_memory()
