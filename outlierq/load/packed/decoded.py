"""A compressed checkpoint presented as a plain one, whose weights are decoded when they are read.

Codes times scales are computed in float32, and that is what `DecodedCheckpoint` gives: what a kernel multiplies. What
is compressed anew is `ServedCheckpoint`: the same product rounded once to the checkpoint's own dtype. So transformers
("dequantize"), DeepSeek's `weight_dequant` and compressed-tensors decompress, it is what the checkpoint serves, and
`-r dense` writes it. Powers of two times codes (MXFP4) are exact in bfloat16; other products are not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import DTYPES, STORED_AS
from outlierq.core.errors import SourceError, during, hinted
from outlierq.core.model import CarriedFile, DerivedCheckpoint, StoredLinear, TensorInfo
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.load.model.activations import round_inputs
from outlierq.load.model.other_tools import compressor
from outlierq.load.packed.described import STALE_FILES, described, without_description
from outlierq.load.source.shards import lookup

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor


DAMAGED = "the file is damaged, or these are scales of another kind; get it again, or start from the original"


@dataclass(frozen=True)
class StoredStack:
    """The weights of all experts of a block in one tensor. shape: as the model class has it. members: by role."""

    shape: tuple[int, int, int]
    members: Mapping[str, str]


@dataclass(frozen=True)
class ServedLinear(StoredLinear):
    """A stored weight whose input is rounded at run time. inputs: how, None for 16 bits."""

    inputs: ActivationScheme | None = field(default=None, kw_only=True)


class DecodedCheckpoint(DerivedCheckpoint):
    """A checkpoint whose compressed weights are presented as float32 tensors.

    linears: by the name of their weight. stacks: of all experts of a block. aside: stored tensors that the plain model
    does not have. Subclasses say how a linear, and one expert of a stack, is decoded.
    """

    def __init__(
        self,
        stored: Checkpoint,
        linears: Mapping[str, StoredLinear],
        aside: Iterable[str] = (),
        stacks: Mapping[str, StoredStack] | None = None,
    ):
        super().__init__(stored)
        self.linears, self.stacks = dict(linears), dict(stacks or {})
        self._packed = dict.fromkeys([*self.linears, *self.stacks])
        self.config: dict[str, Any] = without_description(stored.config)
        shapes: dict[str, tuple[int, ...]] = {name: linear.shape for name, linear in self.linears.items()}
        shapes |= {name: stack.shape for name, stack in self.stacks.items()}
        members = {member for name in shapes for member in self.members(name).values()} | set(aside)
        self.tensors: dict[str, TensorInfo] = {n: info for n, info in stored.tensors.items() if n not in members}
        for name, shape in shapes.items():
            self.tensors[name] = TensorInfo(name, "F32", shape, prod(shape) * 4)

    @property
    def packed(self) -> Collection[str]:
        """Names of the weights that are stored quantized."""
        return self._packed.keys()

    def members(self, name: str) -> Mapping[str, str]:
        """The stored tensors of a packed weight, by role."""
        return (self.stacks[name] if name in self.stacks else self.linears[name]).members

    @abstractmethod
    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""

    def check_shapes(self, name: str) -> None:
        """SourceError when the parts of a packed weight do not fit together, by their headers."""

    def check_scales(self, name: str) -> None:
        """SourceError when the scales of a packed weight are none; its codes are read only where they matter."""

    def decoded_experts(self, name: str, experts: Iterable[int]) -> torch.Tensor:
        """Some experts of a stack, float32 [experts, ...]; no others are read."""
        raise SourceError(f"{name} of {self.source} holds no experts")

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, or a weight decoded to float32 [out, in]."""
        lookup(self.tensors, name)
        if name in self.stacks:
            return self.decoded_experts(name, range(self.stacks[name].shape[0]))
        if name not in self.linears:
            return self.original.read(name)
        with during("decode", name), hinted(DAMAGED):
            return self.decoded(name)

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...]; a linear is decoded whole, of a stack only those experts."""
        if name in self.stacks:
            total = self.stacks[name].shape[0]
            parts = (range(first, min(first + count, total)) for first in range(0, total, count))
            return (self.decoded_experts(name, part) for part in parts)
        return super().read_rows(name, count) if name in self.linears else self.original.read_rows(name, count)

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of the tensor, or some experts of a stack, in the given order, [len(rows), ...]."""
        if name in self.stacks:
            return self.decoded_experts(name, rows)
        return super().read_some_rows(name, rows) if name in self.linears else self.original.read_some_rows(name, rows)

    def parts(self, name: str, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The stored tensors of the linear with this weight, by role, but for some; each in the shape of its header."""
        members = self.linears[name].members
        return {role: self.original.read(stored) for role, stored in members.items() if role not in without}

    def stored_parts(self, name: str) -> Sequence[TensorInfo]:
        """What is stored of a tensor, the codes of a packed weight first."""
        if name not in self.linears and name not in self.stacks:
            return self.original.stored_parts(name)
        return [self.original.tensors[member] for member in self.members(name).values()]

    def making_bytes(self, name: str) -> int:
        """Upper bound of what decoding holds beside the result: what is stored, and scales spread over the weight."""
        if name in self.linears or name in self.stacks:
            return self.stored_bytes(name) + self.tensors[name].nbytes
        return self.original.making_bytes(name)

    def install(self, model: torch.nn.Module, names: Mapping[str, str]) -> None:
        """Let a model with the decoded weights round the inputs of its linears. names: parameter -> stored tensor."""
        inputs = {}
        for slot, tensor in names.items():
            linear = self.linears.get(tensor)
            if isinstance(linear, ServedLinear) and linear.inputs is not None:
                static = linear.members.get("input_scale") or linear.members.get("input_global_scale")
                scale = None if linear.inputs.dynamic or static is None else self.original.read(static).reshape(1)
                inputs[slot.removesuffix(".weight")] = (linear.inputs, scale)
        round_inputs(model, inputs)


def checked_scales(
    name: str, scale: torch.Tensor, decode: Callable[[torch.Tensor], np.ndarray], *, signed: bool = False
) -> torch.Tensor:
    """Scales of a weight, as they are. decode: the weight, by its scales. signed: some programs turn groups round.

    SourceError when one is NaN, infinite or negative, or 0 over codes that are not: a weight of nothing but zeros has
    scales of 0 in some files.
    """
    wrong = scale[~(scale.isfinite() & (signed | (scale >= 0)))]
    if wrong.numel():
        kind = "finite" if signed else "positive"
        raise SourceError(
            f"{wrong.numel()} of {scale.numel()} scales of {name} are no {kind} numbers, first {wrong[0].item():g}",
            hint=DAMAGED,
        )
    empty = scale == 0
    if bool(empty.any()) and decode(empty.float()).any():
        raise SourceError(
            f"{int(empty.sum())} of {scale.numel()} scales of {name} are 0 over weights that are not", hint=DAMAGED
        )
    return scale


def without_codes(empty: torch.Tensor) -> np.ndarray:
    """For scales that may be 0 over any codes: a group of tiny weights has one of those in NVFP4."""
    import numpy as np

    return np.zeros(1)


class ServedCheckpoint(DerivedCheckpoint):
    """What a compressed checkpoint serves, as a plain one in its own dtype: the source of a compression."""

    original: DecodedCheckpoint

    def __init__(self, decoded: DecodedCheckpoint):
        super().__init__(decoded)
        for name in decoded.packed:
            with hinted(DAMAGED):
                decoded.check_shapes(name)
        self.config, self.linears = decoded.config, decoded.linears
        self.reads_rows = decoded.original.reads_rows
        dtype = STORED_AS[self.dtype]
        self.tensors: dict[str, TensorInfo] = dict(decoded.tensors)
        for name in decoded.packed:
            shape = decoded.tensors[name].shape
            self.tensors[name] = TensorInfo(name, dtype, shape, prod(shape) * DTYPES[dtype][1])

    @property
    def packed(self) -> Collection[str]:
        """Names of the weights that are stored quantized."""
        return self.original.packed

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """The files of the checkpoint, without those that describe its former format."""
        return tuple(file for file in self.original.files if file.name not in STALE_FILES)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, a packed weight as it serves. SourceError when its scales make no numbers of it."""
        return self._served(name, self.original.read(name))

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The same, `count` rows or experts at a time, [count, ...]."""
        return (self._served(name, rows) for rows in self.original.read_rows(name, count))

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """The same, of some rows or experts, [len(rows), ...]."""
        return self._served(name, self.original.read_some_rows(name, rows))

    def _served(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Decoded numbers rounded to the dtype of use; other tensors as they are."""
        import torch

        if name not in self.packed:
            return tensor
        served = tensor.to(getattr(torch, self.dtype))
        if not bool(served.isfinite().all()):
            count = int((~served.isfinite()).sum())
            raise SourceError(
                f"{name} of {self.source} decodes to {count} of {served.numel()} values that are not finite in "
                f"{self.dtype}",
                hint=DAMAGED,
            )
        return served

    @property
    def notes(self) -> list[str]:
        """How the weights were stored, and what becomes of them, as a sentence."""
        method, count = compressor(described(self.original.original)), len(self.packed)
        how = f"{count} weights are decoded to {self.dtype}, code x scale rounded once"
        return [f"the source is compressed with {method}: {how}"]

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in] and scales of a packed weight as they are stored."""
        return self.original.quantized(name)

    def code_scheme(self, name: str) -> QuantScheme | None:
        """The scheme of these codes, None where headers do not tell it."""
        return self.original.code_scheme(name) if name in self.linears else None

    def stored_parts(self, name: str) -> Sequence[TensorInfo]:
        """What is stored of a tensor."""
        return self.original.stored_parts(name)

    def making_bytes(self, name: str) -> int:
        """Upper bound of what decoding holds beside the result: also the float32 numbers."""
        decoded = self.original.tensors[name].nbytes if name in self.packed else 0
        return decoded + self.original.making_bytes(name)
