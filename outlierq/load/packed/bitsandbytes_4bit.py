"""Reads 4-bit bitsandbytes checkpoints (QLoRA, arXiv:2305.14314) as transformers saves them, with numpy alone.

`weight` uint8 [n / 2, 1] holds two codes a byte, the earlier one in its HIGH half, of the weight as one row. Each code
is a place in `weight.quant_map` (NF4 or FP4), and `blocksize` of them share a scale, `weight.absmax`. That may be
quantized itself: a byte, a place in `weight.nested_quant_map`, times `weight.nested_absmax` of its block, plus an
offset. Shape, block sizes and offset are JSON in the bytes of `weight.quant_state.bitsandbytes__KIND`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from outlierq.core.errors import SourceError
from outlierq.core.machine.untrusted import brief, json_object
from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.load.packed.codes.numbers import as_array, as_floats
from outlierq.load.packed.decoded import DecodedCheckpoint, checked_scales
from outlierq.load.packed.described import Size, check_member, nothing_packed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.load.packed.codes.numbers import Parts

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
LONGEST_STATE = 1 << 16


class _State(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    blocksize: Size
    shape: Annotated[list[Size], Len(2, 2)]
    nested_blocksize: Size | None = None
    nested_offset: float = Field(0.0, allow_inf_nan=False)


@dataclass(frozen=True)
class FourBitLinear(StoredLinear):
    """How one weight is stored. nested, offset: block size and offset of scales that are quantized; None and 0."""

    blocksize: int
    nested: int | None
    offset: float


class FourBitCheckpoint(DecodedCheckpoint):
    """A 4-bit bitsandbytes checkpoint presented as a plain one."""

    linears: dict[str, FourBitLinear]

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]. SourceError when a scale is no number."""
        import torch

        linear, parts = self.linears[name], self.parts(name)
        scale = torch.from_numpy(_scales(linear, parts))
        checked_scales(name, scale, lambda empty: _times(linear, parts, as_array(empty)))
        return torch.from_numpy(_times(linear, parts, as_array(scale)))

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no positive number, or 0 over codes that are not."""
        import torch

        linear = self.linears[name]
        scale = torch.from_numpy(_scales(linear, self.parts(name, ("weight", "quant_map"))))
        checked_scales(name, scale, lambda empty: _times(linear, self.parts(name), as_array(empty)))

    def quantized(self, name: str) -> QuantTensor:
        """SourceError: the steps of its codes are no even ones."""
        raise SourceError(f"{name} of {self.source} has codes that stand for numbers in a table, not for steps")


def _scales(linear: FourBitLinear, parts: Parts) -> np.ndarray:
    """Float32 [blocks], as bitsandbytes restores them."""
    import numpy as np

    absmax = as_array(parts["absmax"]).reshape(-1)
    if linear.nested is None:
        return absmax.astype(np.float32)
    table, outer = as_floats(parts["nested_quant_map"]), as_floats(parts["nested_absmax"])
    return table[absmax] * np.repeat(outer, linear.nested)[: absmax.size] + np.float32(linear.offset)


def _times(linear: FourBitLinear, parts: Parts, scale: np.ndarray) -> np.ndarray:
    """Float32 [out, in] with these scales."""
    import numpy as np

    packed, table = as_array(parts["weight"]).reshape(-1), as_floats(parts["quant_map"])
    pairs = np.stack([table[np.arange(256) >> 4], table[np.arange(256) & 15]], -1)
    weight = pairs[packed].reshape(-1)
    return (weight * np.repeat(scale, linear.blocksize)[: weight.size]).reshape(linear.shape)


def four_bit_checkpoint(stored: Checkpoint) -> FourBitCheckpoint:
    """The presentation of a 4-bit folder. SourceError when parts are lost or do not fit together."""
    states = [name for name in stored.tensors if STATE in name]
    if not states:
        raise nothing_packed(stored)
    for name in states:
        check_member(stored.tensors[name], "quant_state")
        if stored.tensors[name].nbytes > LONGEST_STATE or name.partition(STATE)[2] not in KINDS:
            raise SourceError(f"{name} is no description of an nf4 or fp4 weight")
    read = stored.read_many(states)
    return FourBitCheckpoint(stored, {name.partition(STATE)[0]: _linear(stored, name, read[name]) for name in states})


def _linear(stored: Checkpoint, state: str, content: torch.Tensor) -> FourBitLinear:
    """How one weight is stored, after its state."""
    name = state.partition(STATE)[0]
    try:
        said = _State.model_validate(json_object(as_array(content).tobytes(), state, SourceError))
    except ValidationError as error:
        first = error.errors()[0]
        raise SourceError(
            f"{state} is not valid at {brief(first['loc'])}: {first['msg']} ({error.error_count()} faults)"
        ) from None
    rows, columns = said.shape
    nested = said.nested_blocksize
    blocks = -(-rows * columns // said.blocksize)
    sizes = {"weight": -(-rows * columns // 2), "absmax": blocks, "quant_map": 16}
    if nested is not None:
        sizes |= {"nested_absmax": -(-blocks // nested), "nested_quant_map": 256}
    members = {role: name if role == "weight" else f"{name}.{role}" for role in sizes}
    for role, member in members.items():
        if member not in stored.tensors:
            raise SourceError(f"{stored.source} is mixed: it has no {member}", hint="get the file again")
        info = stored.tensors[member]
        check_member(info, "absmax in bytes" if role == "absmax" and nested else f"{role} of 4 bits")
        count = info.nbytes if role == "weight" else max(info.shape)
        if count != sizes[role]:
            raise SourceError(f"{member} has {count} values; {rows} x {columns} weights need {sizes[role]}")
    if rows * columns % 2:
        raise SourceError(f"{name} is said to hold {rows} x {columns} weights, an odd number of half bytes")
    members["quant_state"] = state
    return FourBitLinear((rows, columns), members, said.blocksize, nested, said.nested_offset)
