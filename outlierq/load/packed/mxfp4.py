"""MXFP4 experts as gpt-oss stores them: `NAME_blocks` and `NAME_scales` in place of the fused weight NAME.

blocks: uint8 [experts, out, groups, 16], two E2M1 numbers a byte, that of the even column in its low half. scales:
uint8 [experts, out, groups], exponents of two plus 127, for 32 columns each. The model class keeps the weight of an
expert as [in, out], and so it is presented. Every product is exact in float32 and in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.e2m1 import check_nothing, decode_e2m1, e2m1_rows
from outlierq.load.packed.codes.numbers import Parts
from outlierq.load.packed.decoded import DAMAGED, DecodedCheckpoint, StoredStack
from outlierq.load.packed.described import check_member, nothing_packed
from outlierq.load.packed.reading import presents, reads_rows

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

BLOCKS, SCALES = "_blocks", "_scales"
BYTES, COLUMNS = 16, 32  # of a group
NOT_A_NUMBER = 255


class Mxfp4Checkpoint(DecodedCheckpoint):
    """A checkpoint with MXFP4 experts presented as a plain one."""

    def decoded(self, name: str) -> torch.Tensor:
        """No linear is stored apart in this format."""
        raise SourceError(f"{name} of {self.source} is no weight of experts")

    def decoded_experts(self, name: str, experts: Iterable[int]) -> torch.Tensor:
        """Some experts, float32 [experts, in, out]; no others are read. SourceError when a scale is NaN."""
        import torch

        members, chosen = self.stacks[name].members, list(experts)
        blocks, scales = (self.original.read_some_rows(members[role], chosen) for role in ("blocks", "scales"))
        _check_exponents(name, scales)
        decoded = [decode_e2m1(blocks[n].flatten(1), scales[n]).T for n in range(len(chosen))]
        return torch.stack([torch.from_numpy(matrix) for matrix in decoded]).contiguous()

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is NaN, or when all are the least there is over codes that are not 0."""
        scales, members = self.original.read(self.stacks[name].members["scales"]), self.stacks[name].members
        _check_exponents(name, scales)
        if not bool(scales.any()):
            check_nothing(name, self.original.read(members["blocks"]))


def _check_exponents(name: str, scales: torch.Tensor) -> None:
    """SourceError when one is NaN."""
    count = int((scales == NOT_A_NUMBER).sum())
    if count:
        raise SourceError(f"{count} of {scales.numel()} scales of {name} are NaN ({NOT_A_NUMBER})", hint=DAMAGED)


@reads_rows("mxfp4", "blocks", "scales")
def mxfp4_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Rows [start, stop) of one expert's linear. stored: blocks uint8 [out, groups, 16], scales uint8 [out, groups]."""
    parts = {"weight_packed": stored["blocks"].flatten(1), "weight_scale": stored["scales"]}
    return e2m1_rows(parts, scheme, shape, start, stop)


@presents("mxfp4")
def mxfp4_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> Mxfp4Checkpoint:
    """The presentation of a gpt-oss folder. SourceError when blocks and scales do not belong together."""
    names = [name.removesuffix(end) for name in stored.tensors for end in (BLOCKS, SCALES) if name.endswith(end)]
    if not names:
        raise nothing_packed(stored)
    return Mxfp4Checkpoint(stored, {}, stacks={name: _stack(stored, name) for name in dict.fromkeys(names)})


def _stack(stored: Checkpoint, name: str) -> StoredStack:
    """How the weights of all experts are stored. SourceError for a lost part or another shape."""
    members = {"blocks": f"{name}{BLOCKS}", "scales": f"{name}{SCALES}"}
    for role, member in members.items():
        if member not in stored.tensors:
            raise SourceError(f"{stored.source} is mixed: it has no {member}", hint="get the file again")
        check_member(stored.tensors[member], f"{role} of mxfp4")
    if name in stored.tensors:
        raise SourceError(f"{stored.source} is mixed: {name} is stored plain and in MXFP4", hint="get the file again")
    experts, rows, groups, width = stored.tensors[members["blocks"]].shape
    if stored.tensors[members["scales"]].shape != (experts, rows, groups) or width != BYTES:
        raise SourceError(
            f"{members['scales']} is {list(stored.tensors[members['scales']].shape)}, which does not fit blocks "
            f"{[experts, rows, groups, width]}: {BYTES} bytes have one scale"
        )
    return StoredStack((experts, groups * COLUMNS, rows), members)
