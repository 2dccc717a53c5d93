"""Checkpoints of NVIDIA ModelOpt: FP8 and NVFP4, also in one file, told apart by what is stored of each linear.

FP8: see `fp8.py`. NVFP4: `weight` uint8 [out, in / 2], two E2M1 numbers a byte, that of the even column in its low
half; `weight_scale` E4M3 [out, in / 16], in units of `weight_scale_2`, one float32, which multiplies (that of
compressed-tensors divides). Scales of inputs and of the cache are left out: a plain model has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.e2m1 import decode_e2m1, e2m1_rows
from outlierq.load.packed.decoded import checked_scales, without_codes
from outlierq.load.packed.described import check_member
from outlierq.load.packed.fp8 import OF_CACHE, OF_INPUTS, Fp8Checkpoint, fp8_linears
from outlierq.load.packed.reading import presents

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint

UNIT = ".weight_scale_2"
COLUMNS = 16  # that share an E4M3 scale
# Factors for the channels of an input: without them the weight is that of another layer.
PRE_SCALE = ".pre_quant_scale"


@dataclass(frozen=True)
class NvFp4Linear(StoredLinear):
    """How one NVFP4 weight is stored."""


class ModeloptCheckpoint(Fp8Checkpoint):
    """A ModelOpt checkpoint presented as a plain one."""

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""
        import torch

        if not isinstance(self.linears[name], NvFp4Linear):
            return super().decoded(name)
        parts = self.parts(name)
        unit = checked_scales(name, parts["weight_scale_2"].reshape(1), _ones)
        # As ModelOpt computes it: the scale of a group is made first, in float32.
        scale = parts["weight_scale"].float() * unit
        one = decode_e2m1(parts["weight"], torch.full_like(parts["weight_scale"], 1.0), torch.ones(1))
        grouped = torch.from_numpy(one).view(*scale.shape, -1)
        return grouped.mul_(scale[..., None]).view(self.linears[name].shape)

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no number."""
        if not isinstance(self.linears[name], NvFp4Linear):
            return super().check_scales(name)
        read, members = self.original.read, self.linears[name].members
        checked_scales(name, read(members["weight_scale_2"]).reshape(1), _ones)
        checked_scales(name, read(members["weight_scale"]).float(), without_codes, signed=True)
        return None

    def quantized(self, name: str) -> QuantTensor:
        """Codes and scales of a weight. SourceError where no float32 divides as the stored unit multiplies."""
        linear = self.linears[name]
        if not isinstance(linear, NvFp4Linear):
            return super().quantized(name)
        parts = self.parts(name)
        divisor = 1 / parts["weight_scale_2"].reshape(1)
        scale = parts["weight_scale"].float()
        if not bool((scale / divisor == scale * parts["weight_scale_2"]).all()):
            raise SourceError(f"{name} of {self.source} has a unit of scales that no float32 stands for as a divisor")
        members = {"weight_packed": parts["weight"], "weight_scale": parts["weight_scale"]}
        scheme = QuantScheme(4, COLUMNS, True, self.dtype, kind="float", scales="two-level")
        return e2m1_rows({**members, "weight_global_scale": divisor}, scheme, linear.shape, 0, linear.shape[0])


def _ones(empty: torch.Tensor) -> np.ndarray:
    """A unit of 0 makes a whole weight vanish."""
    return empty.numpy()


@presents("modelopt")
@presents("modelopt_fp4")
def modelopt_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> ModeloptCheckpoint:
    """The presentation of a ModelOpt folder. SourceError for numbers that are not decoded here."""
    scaled = next((name for name in stored.tensors if name.endswith(PRE_SCALE)), None)
    if scaled is not None:
        raise SourceError(
            f"{stored.source} multiplies inputs while it runs ({scaled}), which no plain model does",
            hint="start from the original checkpoint, or from one that ModelOpt quantized without AWQ",
        )
    modules = [name.removesuffix(UNIT) for name in stored.tensors if name.endswith(UNIT)]
    fours = {f"{module}.weight": _four_bits(stored, module) for module in modules}
    used = {member for linear in fours.values() for member in linear.members.values()}
    linears, stacks = fp8_linears(stored, config, without=used)
    if not fours and not linears and not stacks:
        algorithm = config.get("quant_algo") or "no algorithm"
        raise SourceError(f"{stored.source} is a ModelOpt checkpoint ({algorithm}) without FP8 or NVFP4 weights")
    aside = [name for name in stored.tensors if name.endswith((*OF_INPUTS, *OF_CACHE))]
    return ModeloptCheckpoint(stored, {**linears, **fours}, aside, stacks)


def _four_bits(stored: Checkpoint, module: str) -> NvFp4Linear:
    """How one NVFP4 weight is stored. SourceError for a lost part or another shape."""
    members = {role: f"{module}.{role}" for role in ("weight", "weight_scale", "weight_scale_2")}
    roles = ("weight_packed of 4-bit floats", "weight_scale of nvfp4", "weight_global_scale")
    for role, member in zip(roles, members.values(), strict=True):
        if member not in stored.tensors:
            raise SourceError(f"{stored.source} is mixed: it has no {member}", hint="get the file again")
        check_member(stored.tensors[member], role)
    rows, pairs = stored.tensors[members["weight"]].shape
    scales = stored.tensors[members["weight_scale"]].shape
    if scales != (rows, 2 * pairs // COLUMNS) or 2 * pairs % COLUMNS:
        needed = f"{rows} x {2 * pairs} weights need {rows} x {2 * pairs // COLUMNS}"
        raise SourceError(f"{members['weight_scale']} is {list(scales)}; {needed}")
    return NvFp4Linear((rows, 2 * pairs), members, symmetric=True)
