"""A checkpoint that stores all experts of a block in one tensor, presented as one that stores each expert apart.

`ExpertsApart` cuts an expert's part out of the fused tensor when it is read, and reads no more of the file than that
expert. `ExpertsTogether` is the way back, on top of whatever was done to the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError
from outlierq.core.model import DerivedCheckpoint, Piece, StoredLinear, TensorInfo
from outlierq.load.model.experts.finding import fused_modules
from outlierq.load.model.experts.layout import Layout, Leaves, merged_leaves, rows_of, usual_leaves
from outlierq.load.model.names import stored_names

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.scheme import QuantScheme


def experts_apart(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every expert apart; the checkpoint itself when it has no fused experts that can be cut."""
    from outlierq.load.model.skeleton import empty_model

    if checkpoint.kind == "gguf" or not _may_be_fused(checkpoint):
        return checkpoint
    try:
        skeleton = empty_model(checkpoint)
    except SourceError:
        return checkpoint  # whoever builds the model says why it cannot be
    pieces = dict(_pieces(checkpoint, skeleton))
    return ExpertsApart(checkpoint, pieces) if pieces else checkpoint


def _may_be_fused(checkpoint: Checkpoint) -> bool:
    """Whether there is a tensor of three dimensions that is no kernel of a depthwise convolution."""
    return any(len(info.shape) == 3 and info.shape[1] > 1 for info in checkpoint.tensors.values())


def _pieces(checkpoint: Checkpoint, skeleton: torch.nn.Module) -> Iterator[tuple[str, Piece]]:
    """(name, piece) of every part of every expert, in the order in which each expert's parts are used."""
    held = stored_names([name for name, info in checkpoint.tensors.items() if len(info.shape) in (2, 3)], skeleton)
    for name, layout in fused_modules(skeleton).items():
        stored = {slot: held.get(f"{name}.{slot}") for slot in layout.slots}
        if all(stored.values()):
            yield from _of_module(checkpoint, skeleton, name, layout, stored)


def _of_module(
    checkpoint: Checkpoint, skeleton: torch.nn.Module, name: str, layout: Layout, stored: Mapping[str, str]
) -> Iterator[tuple[str, Piece]]:
    """The parts of one module. stored: the tensor of each of its parameters."""
    part, prefix = skeleton.get_submodule(name), _prefix(name, layout, stored)
    of_one = list(layout.pieces(_leaves(skeleton, name, layout)))
    ways = {slot: _transposed(checkpoint.tensors[stored[slot]], part, slot, layout) for slot in layout.slots}
    if None in ways.values():
        return  # another shape than the class has: the names say so
    for expert in range(layout.widths(part)[0]):
        for slot, leaf, which in of_one:
            shape = checkpoint.tensors[stored[slot]].shape
            rows = rows_of(which, shape[-1] if ways[slot] else shape[1])
            yield f"{prefix}.{expert}.{leaf}", Piece(stored[slot], prefix, expert, rows, bool(ways[slot]), shape)


def _leaves(skeleton: torch.nn.Module, name: str, layout: Layout) -> Leaves:
    """What the parts of a module are called."""
    return merged_leaves(skeleton, name, layout) or usual_leaves(layout)


def _prefix(name: str, layout: Layout, stored: Mapping[str, str]) -> str:
    """What the parts' names begin with: the module as the file calls it, unless the file knows no such module."""
    before, _, leaf = stored[layout.up].rpartition(".")
    return before if leaf == layout.up and before.rpartition(".")[2] == name.rpartition(".")[2] else name


def _transposed(info: TensorInfo, part: torch.nn.Module, slot: str, layout: Layout) -> bool | None:
    """Whether matrices of a stored tensor are [in, out]; None when it has another shape than the parameter.

    Some files have them the other way round than their class (Qwen3-VL-MoE); transformers looks at the shape, too.
    """
    shape, declared = tuple(part._parameters[slot].shape), layout.is_transposed and len(info.shape) == 3
    if info.shape == shape:
        return declared
    return not declared if info.shape == (shape[0], *reversed(shape[1:])) else None


class ExpertsApart(DerivedCheckpoint):
    """A checkpoint with separate experts on top of one with fused tensors. pieces: name of each part -> where it is."""

    def __init__(self, original: Checkpoint, pieces: Mapping[str, Piece]):
        super().__init__(original)
        self.pieces = pieces
        self.config: dict[str, Any] = original.config
        self.linears: Mapping[str, StoredLinear] = original.linears
        self.reads_rows = original.reads_rows
        self.tensors: dict[str, TensorInfo] = dict(self._infos())
        fused = {piece.tensor for piece in pieces.values()}
        parts = (name for name, piece in pieces.items() if piece.tensor in original.packed)
        self._packed = dict.fromkeys([*(name for name in original.packed if name not in fused), *parts])

    def _infos(self) -> Iterator[tuple[str, TensorInfo]]:
        """The headers; parts stand where their fused tensors were."""
        parts: dict[str, list[str]] = {}
        for name, piece in self.pieces.items():
            parts.setdefault(piece.tensor, []).append(name)
        for name, info in self.original.tensors.items():
            if name not in parts:
                yield name, info
            for part in parts.get(name, ()):
                shape = self.pieces[part].shape(info.shape)
                yield part, TensorInfo(part, info.dtype, shape, info.nbytes // prod(info.shape) * prod(shape))

    @property
    def packed(self) -> Collection[str]:
        """Those of the original, the parts of a fused tensor in place of it."""
        return self._packed.keys()

    @property
    def weight_files(self) -> list[Path]:
        """Those of the original."""
        return list(self.original.weight_files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, or the part of one expert, in the shape of its header."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors, each in the shape of its header; an expert that several parts are cut from is read once."""
        names = list(names)
        found = self.original.read_many([name for name in names if name not in self.pieces])
        at: tuple[str, int] | None = None
        for name in sorted((name for name in names if name in self.pieces), key=self._place):
            piece = self.pieces[name]
            if at != (piece.tensor, piece.expert):
                at = piece.tensor, piece.expert
                expert = self.original.read_some_rows(piece.tensor, [piece.expert])[0]
            found[name] = piece.of(expert).clone(memory_format=_contiguous())
        return {name: found[name] for name in names}

    def _place(self, name: str) -> tuple[str, int]:
        """Where a part is stored."""
        return self.pieces[name].tensor, self.pieces[name].expert

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...]; an expert's part is small enough to be read at once."""
        return super().read_rows(name, count) if name in self.pieces else self.original.read_rows(name, count)

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of the tensor, [len(rows), ...]."""
        return super().read_some_rows(name, rows) if name in self.pieces else self.original.read_some_rows(name, rows)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as the file stores it; of a part its share of the fused one."""
        if name not in self.pieces:
            return self.original.stored_bytes(name)
        fused = self.original.tensors[self.pieces[name].tensor]
        return self.original.stored_bytes(fused.name) * prod(self.tensors[name].shape) // prod(fused.shape)

    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself: all that is stored of the expert."""
        if name not in self.pieces:
            return self.original.making_bytes(name)
        fused = self.original.tensors[self.pieces[name].tensor]
        return (fused.nbytes + self.original.making_bytes(fused.name)) // fused.shape[0]

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in] of the original."""
        return self.original.quantized(name)

    def code_scheme(self, name: str) -> QuantScheme | None:
        """Their scheme."""
        return self.original.code_scheme(name) if name not in self.pieces else None

    def piece(self, name: str) -> Piece | None:
        """Where a part of an expert is."""
        return self.pieces.get(name)

    def install(self, model: torch.nn.Module, names: Mapping[str, str]) -> None:
        """What the original asks for."""
        self.original.install(model, names)


def fused_pieces(checkpoint: Checkpoint) -> Mapping[str, Piece]:
    """Name -> piece of every part that the checkpoint, or one below it, cuts out of a fused tensor."""
    apart = _apart_below(checkpoint)
    return {} if apart is None else {name: piece for name, piece in apart.pieces.items() if name in checkpoint.tensors}


def experts_together(checkpoint: Checkpoint, modules: Collection[str]) -> Checkpoint:
    """The checkpoint with the experts of these modules (`Piece.module`) in fused tensors again, as in the file."""
    apart = _apart_below(checkpoint)
    if apart is None or not modules:
        return checkpoint
    pieces = {name: piece for name, piece in fused_pieces(checkpoint).items() if piece.module in modules}
    return ExpertsTogether(checkpoint, pieces, apart.original.tensors)


def as_stored(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its experts as the file has them, when all that was done is to cut them out."""
    return checkpoint.original if isinstance(checkpoint, ExpertsApart) else checkpoint


def with_parts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint before some of its experts were put together."""
    return checkpoint.original if isinstance(checkpoint, ExpertsTogether) else checkpoint


def _apart_below(checkpoint: Checkpoint) -> ExpertsApart | None:
    """The checkpoint that cuts experts out of fused tensors, of those on top of each other; None when none does."""
    while not isinstance(checkpoint, ExpertsApart):
        if not isinstance(checkpoint, DerivedCheckpoint):
            return None
        checkpoint = checkpoint.original
    return checkpoint


class ExpertsTogether(DerivedCheckpoint):
    """Some modules' experts in fused tensors again, in the form in which the file had them.

    below: has the parts, perhaps changed or fewer of them. pieces: of these modules' experts. stored: the headers of
    the file.
    """

    def __init__(self, below: Checkpoint, pieces: Mapping[str, Piece], stored: Mapping[str, TensorInfo]):
        super().__init__(below)
        self.config: dict[str, Any] = below.config
        self.linears, self.reads_rows = below.linears, below.reads_rows
        self._parts: dict[str, dict[str, Piece]] = {}
        for name, piece in pieces.items():
            self._parts.setdefault(piece.tensor, {})[name] = piece
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in below.tensors.items():
            tensor = pieces[name].tensor if name in pieces else None
            if tensor is None:
                self.tensors[name] = info
            elif tensor not in self.tensors:
                self.tensors[tensor] = self._together(stored[tensor], info.dtype)

    def _together(self, info: TensorInfo, dtype: str) -> TensorInfo:
        """The header of a fused tensor with as many experts as there are."""
        count = len({piece.expert for piece in self._parts[info.name].values()})
        size = info.nbytes // prod(info.shape)
        return replace(info, shape=(count, *info.shape[1:]), nbytes=size * count * prod(info.shape[1:]))

    def read(self, name: str) -> torch.Tensor:
        """The tensor; a fused one, [experts, ...], is put together expert by expert."""
        import torch

        if name not in self._parts:
            return self.original.read(name)
        info = self.tensors[name]
        fused = torch.empty(info.shape, dtype=getattr(torch, DTYPES[info.dtype][0]))
        for part, piece in self._parts[name].items():
            piece.of(fused[piece.expert]).copy_(self.original.read(part))
        return fused

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...]."""
        return super().read_rows(name, count) if name in self._parts else self.original.read_rows(name, count)

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of the tensor, [len(rows), ...]."""
        return super().read_some_rows(name, rows) if name in self._parts else self.original.read_some_rows(name, rows)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as the file stores it."""
        parts = self._parts.get(name)
        return self.original.stored_bytes(name) if parts is None else sum(map(self.original.stored_bytes, parts))

    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself: one part at a time."""
        parts = self._parts.get(name)
        if parts is None:
            return self.original.making_bytes(name)
        return max(self.original.tensors[part].nbytes + self.original.making_bytes(part) for part in parts)


def _contiguous() -> torch.memory_format:
    """Rows behind each other."""
    import torch

    return torch.contiguous_format
