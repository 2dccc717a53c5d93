"""Tensors of all experts of a block, put together on disk: an expert is written once all of its parts are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.model import Piece
from outlierq.export.writer import ShardWriter

if TYPE_CHECKING:
    import torch


class Stacks:
    """Parts that wait for the others of their expert. One tensor is put by one thread; several tensors by several."""

    def __init__(self, writer: ShardWriter):
        self.writer = writer
        self._experts: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}  # what there is, and rows that lack
        self._written: dict[str, int] = {}  # experts by tensor

    def put(self, name: str, piece: Piece, part: torch.Tensor) -> dict[str, bytes]:
        """Keep a part [rows, ...], and write its expert when it is complete; the digest by name of a whole tensor.

        The bytes of each expert are read back and compared.
        """
        shape = self.writer.layout.places[name].tensor.shape
        whole, lacking = self._experts.pop((name, piece.expert), (part.new_empty(shape[1:]), shape[1]))
        whole[piece.rows] = part
        if lacking > len(part):
            self._experts[name, piece.expert] = whole, lacking - len(part)
            return {}
        self.writer.write(name, whole[None], piece.expert)
        self.writer.confirm(name, whole[None], piece.expert)
        self._written[name] = self._written.get(name, 0) + 1
        return {name: self.writer.digest(name)} if self._written[name] == shape[0] else {}
