"""A checkpoint under the names of its class: what transformers makes of stored tensors as it loads them, made before.

Transformers can neither split nor join tensors that are packed. Under the names of the class's own parameters there is
nothing to split or to join, so a compressed result loads; programs that know the names of the file only do not read it.
Experts that it merges itself from packed ones stay apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from outlierq.core.model import Checkpoint, DerivedCheckpoint, StoredLinear, TensorInfo
from outlierq.load.model.conversion.pieces import Made, Piece, Sizes, Values, conversions_of
from outlierq.load.model.experts.apart import as_stored, experts_apart
from outlierq.load.model.experts.fused import separate_experts
from outlierq.load.model.names import stored_names
from outlierq.load.model.skeleton import empty_model

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.scheme import QuantScheme


def class_named(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors as its class has them; the checkpoint itself where they are stored so.

    SourceError when transformers cannot build the class.
    """
    if checkpoint.kind == "gguf":
        return checkpoint
    stored = as_stored(checkpoint)
    model = empty_model(stored)
    separate_experts(model, stored)
    conversions, sizes = conversions_of(model, stored)
    lasting = [made for made in [*conversions, *_renamed(stored, model)] if _lasts(made, model, sizes)]
    return experts_apart(ClassNamed(stored, lasting, sizes)) if lasting else checkpoint


class Renamed(Made):
    """A parameter that is stored as it is, under another name."""

    def of(self, values: Values, sizes: Sizes) -> Values:
        """The parameter by its name."""
        return {self.slot: values[self.pieces[0].name]}


def _renamed(stored: Checkpoint, model: torch.nn.Module) -> list[Made]:
    """Every parameter that transformers has under another name than the file."""
    names = {slot: tensor for slot, tensor in stored_names(stored.tensors, model).items() if slot != tensor}
    return [Renamed(None, slot, [_whole(stored.tensors[tensor])]) for slot, tensor in names.items()]


def _whole(info: TensorInfo) -> Piece:
    """A stored tensor as the only piece of something."""
    return Piece(info.name, "", [], info.name, tuple(info.shape))


def _lasts(made: Made, model: torch.nn.Module, sizes: Sizes) -> bool:
    """Whether transformers leaves what a conversion makes as it is when it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    prefix = model.base_model_prefix or None
    return all(
        rename_source_key(name, renamings, converters, prefix, sizes.slots) == (name, None)
        for name in made.shapes(sizes)
    )


class ClassNamed(DerivedCheckpoint):
    """A checkpoint with made parameters in the place of the tensors that they are made of."""

    def __init__(self, original: Checkpoint, conversions: Collection[Made], sizes: Sizes):
        super().__init__(original)
        self.config: dict[str, Any] = original.config
        self.reads_rows = original.reads_rows
        self._sizes = sizes
        self._made = {name: made for made in conversions for name in made.shapes(sizes)}
        self._gone = {piece.tensor for made in conversions for piece in made.pieces}
        self.linears: Mapping[str, StoredLinear] = {
            name: linear for name, linear in original.linears.items() if name not in self._gone
        }
        self.tensors: dict[str, TensorInfo] = dict(self._infos(conversions))

    def _infos(self, conversions: Collection[Made]) -> Iterator[tuple[str, TensorInfo]]:
        """The headers; what is made stands where the first of its pieces was."""
        first = {made.pieces[0].tensor: made for made in conversions}
        for name, info in self.original.tensors.items():
            if name not in self._gone:
                yield name, info
            for slot, shape in (first[name].shapes(self._sizes) if name in first else {}).items():
                yield slot, TensorInfo(slot, info.dtype, shape, info.nbytes // prod(info.shape) * prod(shape))

    @property
    def packed(self) -> Collection[str]:
        """Those of the original that are as they were."""
        return [name for name in self.original.packed if name not in self._gone]

    @property
    def weight_files(self) -> list[Path]:
        """Those of the original."""
        return list(self.original.weight_files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, or what its pieces make, in the shape of its header."""
        made = self._made.get(name)
        if made is None:
            return self.original.read(name)
        stored = self.original.read_many([piece.tensor for piece in made.pieces])
        value: torch.Tensor = made.of({piece.name: stored[piece.tensor] for piece in made.pieces}, self._sizes)[name]
        return value.contiguous()

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...]."""
        return super().read_rows(name, count) if name in self._made else self.original.read_rows(name, count)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as the file stores it; of a made one its share of what it is made of."""
        made = self._made.get(name)
        if made is None:
            return self.original.stored_bytes(name)
        whole = sum(prod(shape) for shape in made.shapes(self._sizes).values())
        stored = sum(self.original.stored_bytes(piece.tensor) for piece in made.pieces)
        return stored * prod(self.tensors[name].shape) // whole

    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself: all its pieces, and what they make."""
        made = self._made.get(name)
        if made is None:
            return self.original.making_bytes(name)
        below = self.original
        return sum(2 * below.tensors[piece.tensor].nbytes + below.making_bytes(piece.tensor) for piece in made.pieces)

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in] of the original."""
        return self.original.quantized(name)

    def code_scheme(self, name: str) -> QuantScheme | None:
        """Their scheme."""
        return None if name in self._made else self.original.code_scheme(name)
