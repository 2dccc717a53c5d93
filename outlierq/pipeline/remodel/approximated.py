"""A checkpoint of which some weights are approximated, one block at a time, when they are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.model import Checkpoint
from outlierq.pipeline.remodel.derived import RemodelledCheckpoint

if TYPE_CHECKING:
    import torch


class ApproximatedCheckpoint(RemodelledCheckpoint):
    """A checkpoint that computes something else than its original.

    blocks: the block of every tensor that may change. made: gives the changed ones of a block by name, in the shape and
    dtype of their headers. notes: what was done, for the report.
    """

    def __init__(
        self,
        original: Checkpoint,
        identity: Any,
        blocks: Mapping[str, int],
        made: Callable[[int], Mapping[str, torch.Tensor]],
        note: str,
    ):
        super().__init__(original, identity)
        self.config: dict[str, Any] = original.config
        self.tensors = original.tensors
        self.notes: tuple[str, ...] = (note,)
        self._blocks, self._made = blocks, made
        self._held: tuple[int, Mapping[str, torch.Tensor]] = (-1, {})
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        """The tensor, approximated where it was asked, in the shape of its header."""
        index = self._blocks.get(name)
        if index is None:
            return self.original.read(name)
        with self._lock:
            if self._held[0] != index:
                self._held = index, self._made(index)
            changed = self._held[1].get(name)
        return self.original.read(name) if changed is None else changed
