"""The packed weight layout of the kernels, "oq4" and "oq8": a reordering of the codes, and back. Pure torch.

Codes are cut into tiles of 16 outputs x 64 inputs; in a tile, each of a warp's 32 lanes finds in 16 consecutive bytes
the codes it needs as fragments of the tensor core's B operand (`packed.cuh` says which). Ragged edges are filled up:
outputs to a multiple of 16, inputs to a multiple of 64. Checkpoints keep their own format; this one lives in memory.
`runtime/layout.py` is that of torch's CPU products, `export/layout.py` that of files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from outlierq.core.errors import OutlierqError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.ops import outlier_victim
from outlierq.ops.compiled.products import CODES, float_bits

TILE_OUTPUTS, TILE_INPUTS = 16, 64
DTYPES = (torch.float16, torch.bfloat16)
GROUPS = (None, 32, 64, 128)
LARGEST_POWER = 64.0  # in float16, whose largest number is 65504: 448 times this fits


class KernelError(OutlierqError):
    """Tensors that a kernel cannot take; found before anything is launched."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out_features, in_features] in the kernels' layout: `scale * (code - zero_point)`, codes unsigned, or
    `factor * scale * code`, codes E2M1, E4M3 or those of outlier-victim pairs.

    words: int32 [ceil(out / 16), ceil(in / 64), 32 * bits]. scale: [groups, out], float16 or bfloat16; inputs and
    outputs have the same dtype. zero_point: [groups, out] whole numbers in that dtype; None means 2^(bits - 1).
    bits: 4 or 8, the width of a stored code. group_size: inputs that share a scale, None for all of them.
    kind: of a `QuantScheme`. factor: float32 [1]; None means 1.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    bits: int
    group_size: int | None
    out_features: int
    in_features: int
    kind: str = "int"
    factor: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of scales, inputs and outputs."""
        return self.scale.dtype

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        parts = {"words": self.words, "scale": self.scale, "zero_point": self.zero_point, "factor": self.factor}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})


def groups_for(kind: str) -> tuple[int | None, ...]:
    """The widths of groups that kernels take; None for a whole row. kind: of a `QuantScheme`."""
    return (16, *GROUPS) if kind == "float" else GROUPS


def pack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PackedWeight:
    """The weight `scale * (codes - zero_point)` in the kernels' layout.

    codes: [out, in] integers, signed without zero points, else 0 .. 2^bits - 1. scale, zero_point: [out, groups].
    bits: 4 or 8; narrower codes fit as they are. dtype: of the inputs to come; scales are rounded to it.
    """
    rows, columns = codes.shape
    _check(codes, scale, zero_point, bits, group_size, dtype)
    offset = 1 << (bits - 1) if zero_point is None else 0
    words = _pack_words(_filled((codes.short() + offset).to(torch.uint8)), bits)
    spread = None if zero_point is None else zero_point.T.to(dtype).contiguous()
    return PackedWeight(words, scale.T.to(dtype).contiguous(), spread, bits, group_size, rows, columns)


def pack_floats(weight: QuantTensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """A weight of E2M1 or E4M3 numbers in the kernels' layout, for inputs of a dtype.

    Plain scales are rounded to it. Those in E4M3 and powers of two are held without rounding, a factor beside them.
    KernelError where float16 does not reach as far as they do.
    """
    scheme, (rows, columns) = weight.scheme, weight.shape
    scale, factor = _scales(weight, dtype)
    group_size = scheme.block[1] if scheme.block is not None else scheme.group_size
    kind = "e2m1" if scheme.bits == 4 else "e4m3"
    _check(torch.zeros_like(weight.codes, dtype=torch.int8), scale, None, scheme.bits, group_size, dtype, "float")
    reason = out_of_reach(weight, dtype)
    if reason is not None:
        raise KernelError(reason)
    words = _pack_words(_filled(float_bits(weight.codes, kind)), scheme.bits)
    held = scale.T.to(dtype).contiguous()
    return PackedWeight(words, held, None, scheme.bits, group_size, rows, columns, "float", factor)


def pack_pairs(weight: QuantTensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """A weight of outlier-victim pairs in the kernels' layout, for inputs of a dtype, to which scales are rounded."""
    (rows, columns), size, kind = weight.shape, weight.scheme.group_size, weight.scheme.kind
    _check(torch.zeros_like(weight.codes), weight.scale, None, 4, size, dtype, kind)
    words = _pack_words(_filled(outlier_victim.encode(weight.codes)), 4)
    return PackedWeight(words, weight.scale.T.to(dtype).contiguous(), None, 4, size, rows, columns, kind)


def out_of_reach(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    """Why a dtype does not hold all numbers of a weight of floats, but for its factor; None if it does."""
    if weight.scheme.scales == "plain":
        return None
    scale, _ = _scales(weight, dtype)
    grouped = torch.unflatten(weight.codes.float(), 1, (scale.shape[1], -1)) * scale[..., None]
    if torch.equal(grouped.to(dtype).float(), grouped):
        return None
    return f"its {weight.scheme.numbers} scales reach farther than {str(dtype).removeprefix('torch.')}"


def _scales(weight: QuantTensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(float32 [out, groups], factor [1] or None) of a weight of floats; float16 has powers of two near 1."""
    if weight.super_scale is not None:
        return weight.scale.float(), 1 / weight.super_scale
    scale = weight.float_scale
    if weight.scheme.block is not None:
        return scale.repeat_interleave(weight.scheme.block[0], 0)[: weight.shape[0]], None
    if weight.scheme.scales != "power-of-two" or dtype != torch.float16:
        return scale, None
    factor = scale.amax().reshape(1) / LARGEST_POWER
    return scale / factor, factor


def _filled(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] with zeros, so that they are whole tiles."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % TILE_INPUTS, 0, -codes.shape[0] % TILE_OUTPUTS))


def unpack(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(codes, scale, zero_point) as `pack` took them: codes int16 or float32 [out, in], the others [out, groups]."""
    rows, columns = weight.shape
    codes = _unpack_words(weight.words, weight.bits)[:rows, :columns].short()
    if weight.kind == "outlier-victim":
        return outlier_victim.decode(codes.to(torch.uint8)), weight.scale.T, None
    if weight.kind == "float":
        values = CODES["e2m1" if weight.bits == 4 else "e4m3"].values
        return values.to(codes.device)[codes.int()], weight.scale.T, None
    if weight.zero_point is None:
        return codes - (1 << (weight.bits - 1)), weight.scale.T, None
    return codes, weight.scale.T, weight.zero_point.T.short()


# Axes of a code's place: strip s, half j of the strip, column g | tile t, step h kk, half r of the step, lane part q,
# element e of a pair. Output = 16 s + 8 j + g, input = 64 t + 32 h + 16 kk + 8 r + 2 q + e, lane = 4 g + q.
_AXES = "sjgthkrqe"
_SIZES = {"j": 2, "g": 8, "h": 2, "k": 2, "r": 2, "q": 4, "e": 2}
_ORDER = {4: "stgqjhekr", 8: "stjgqhkre"}


def _pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [16 strips, 64 tiles] as int32 [strips, tiles, 32 bits]: axes in the order of memory, smallest last."""
    strips, tiles = codes.shape[0] // TILE_OUTPUTS, codes.shape[1] // TILE_INPUTS
    places = codes.view(strips, 2, 8, tiles, 2, 2, 2, 4, 2).permute(*(_AXES.index(a) for a in _ORDER[bits]))
    if bits == 4:
        places = places[..., 0] | places[..., 1] << 4
    return places.contiguous().view(-1).view(torch.int32).view(strips, tiles, 32 * bits)


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_pack_words`."""
    strips, tiles = words.shape[:2]
    flat = words.contiguous().view(-1).view(torch.uint8)
    if bits == 4:
        flat = torch.stack([flat & 15, flat >> 4], -1)
    sizes = {**_SIZES, "s": strips, "t": tiles}
    places = flat.reshape([sizes[a] for a in _ORDER[bits]]).permute(*(_ORDER[bits].index(a) for a in _AXES))
    return places.reshape(strips * TILE_OUTPUTS, tiles * TILE_INPUTS)


def _check(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    kind: str = "int",
) -> None:
    """Refuse what the layout cannot hold."""
    rows, columns = codes.shape
    if bits not in (4, 8) or dtype not in DTYPES:
        raise KernelError(f"packed weights have 4 or 8 bits and float16 or bfloat16 scales, not {bits} and {dtype}")
    if rows % 8 or columns % 16:
        raise KernelError(f"a packed weight needs out % 8 = 0 and in % 16 = 0; this one is {rows} x {columns}")
    if group_size not in groups_for(kind) or (group_size and columns % group_size):
        raise KernelError(f"group_size {group_size} does not fit {columns} inputs; 32, 64, 128 or the whole row do")
    groups = columns // group_size if group_size else 1
    for name, values in (("scale", scale), ("zero_point", zero_point)):
        if values is not None and tuple(values.shape) != (rows, groups):
            raise KernelError(f"{name} is {tuple(values.shape)} where the weight has {rows} outputs x {groups} groups")
    low = -(1 << (bits - 1)) if zero_point is None else 0
    smallest, largest = (int(v) for v in torch.aminmax(codes))
    if smallest < low or largest >= low + (1 << bits):
        raise KernelError(f"codes {smallest} .. {largest} do not fit {bits} bits from {low} on")
