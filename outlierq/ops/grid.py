"""Grids of integers, of E4M3, E2M3 or E2M1 floats: scales, zero points and rounding, defined once for every method.

A scheme with two-dimensional blocks is handled as groups of columns whose scale is the same in all rows of a block, so
that every method works with it; `over_blocks` is what makes the rows of a block agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from outlierq.core.errors import NumbersError
from outlierq.core.gguf.types import BlockType
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import FP4_MAX, FP6_MAX, FP8_MAX, QuantScheme
from outlierq.ops.codebooks import nearest_level, nearest_vectors
from outlierq.ops.outlier_victim import nearest_pairs, spread_scale

SMALLEST_E4M3 = 2.0**-9
SMALLEST_FLOAT16 = 2.0**-24
# The divisor of E4M3 scales, and the largest magnitudes of weights that it serves: scales stay under 448, and normal
# (from 2^-6) down to groups that are 100 times smaller than the rest.
USUAL_UNIT, USUAL_WEIGHTS = 1024.0, (0.01, FP4_MAX * FP8_MAX / 1024)

# Bits of a float32 mantissa that a number of so many bits times a power of two does not have.
NO_SUCH_BITS = {4: 0x3FFFFF, 6: 0xFFFFF, 8: 0xFFFFF}


@dataclass(frozen=True)
class Grid:
    """One scale and zero point per (row, group). scale: [out, groups] float32, already rounded to the storage dtype.

    zero_point: [out, groups] float32 integers, or None when the scheme is symmetric. With blocks, the rows of a block
    hold the same scale. units: of two-level scales, else None; they are chosen once from the weight and stay. Float32
    [1] or [out, blocks, 1 or 2], see `QuantTensor.super_scale`. Beside real minima zero points are minimum / scale, and
    no integers.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme
    units: torch.Tensor | None = None

    def with_scale(self, scale: torch.Tensor) -> Grid:
        """A grid with another scale [out, groups], rounded to what can be stored."""
        return storable(scale, self.zero_point, self.scheme, self.units)

    def encode(self, grouped: torch.Tensor, curvature: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 codes of `grouped` [out, groups, columns]: nearest code, clamped to the range.

        curvature: [in / 2, 2, 2], by which pairs of columns are rounded (`outlier_victim.curvatures`).
        """
        if self.scheme.kind == "outlier-victim":
            return nearest_pairs((grouped / self.scale[..., None]).flatten(1), curvature).view(grouped.shape)
        if self.scheme.vector > 1:
            ratio = (grouped / self.scale[..., None]).view(-1, self.scheme.together)
            return nearest_vectors(ratio, self.scheme.blocks).view(grouped.shape)
        zero_point = None if self.zero_point is None else self.zero_point[..., None]
        return nearest_code(grouped / self.scale[..., None], zero_point, self.scheme)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Float32 weights of `codes` [out, groups, columns]."""
        if self.zero_point is not None:
            codes = codes - self.zero_point[..., None]
        return codes * self.scale[..., None]

    def round(self, grouped: torch.Tensor, curvature: torch.Tensor | None = None) -> torch.Tensor:
        """The nearest grid value of every weight, in the shapes of `encode`."""
        return self.decode(self.encode(grouped, curvature))

    def where(self, better: torch.Tensor, other: Grid) -> Grid:
        """This grid, with `other`'s values at the [out, groups] places where `better` is true."""
        zero_point = None
        if self.zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(better, other.zero_point, self.zero_point)
        return replace(self, scale=torch.where(better, other.scale, self.scale), zero_point=zero_point)

    def per_column(self, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point of every weight, [out, in]."""
        repeat = self.scheme.columns_per_group(columns)
        zero_point = None if self.zero_point is None else self.zero_point.repeat_interleave(repeat, dim=1)
        return self.scale.repeat_interleave(repeat, dim=1)[:, :columns], zero_point


def joined(parts: Sequence[Grid]) -> Grid:
    """The grid of a weight whose rows were given in parts, each with units of its own."""
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    units = [part.units for part in parts if part.units is not None]
    return replace(
        parts[0],
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zero_points) if zero_points else None,
        units=torch.cat(units) if units else None,
    )


def nearest_code(ratio: torch.Tensor, zero_point: torch.Tensor | None, scheme: QuantScheme) -> torch.Tensor:
    """The code nearest to `ratio` = weight / scale, in float32 and in place: round to even, saturate at the range.

    ratio: of any shape; zero_point broadcasts against it.
    """
    if scheme.kind == "float" and scheme.bits < 8:
        return nearest_e2m1(ratio) if scheme.bits == 4 else nearest_e2m3(ratio)
    if scheme.kind == "float":
        # Clamped first: the cast has no infinity to saturate to, it would give NaN.
        return ratio.copy_(ratio.clamp_(scheme.code_min, scheme.code_max).to(torch.float8_e4m3fn))
    if scheme.kind == "codebook":
        return nearest_level(ratio, scheme.blocks.name)
    if scheme.has_real_minima and zero_point is not None:
        return ratio.add_(zero_point).round_().clamp_(scheme.code_min, scheme.code_max)  # zero points are no integers
    ratio.round_()
    if zero_point is not None:
        ratio.add_(zero_point)
    return ratio.clamp_(scheme.code_min, scheme.code_max)


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded in place to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 of either sign, ties to the even mantissa, saturating.

    E2M1 of the OCP Microscaling Formats specification 1.0, section 5.3.3: steps of 0.5 below 2, of 1 below 4, of 2.
    x: float32 of any shape.
    """
    return _nearest_in_steps(x, 0.5, FP4_MAX)


def nearest_e2m3(x: torch.Tensor) -> torch.Tensor:
    """The same for E2M3: steps of 1/8 below 2, of 1/4 below 4, of 1/2 up to 7.5. x: float32 of any shape."""
    return _nearest_in_steps(x, 0.125, FP6_MAX)


def _nearest_in_steps(x: torch.Tensor, least: float, largest: float) -> torch.Tensor:
    """`x`, of any shape, in place in steps of `least`, of twice that from 2 on and of four times that from 4 on."""
    x.clamp_(-largest, largest)
    size = x.abs()
    step = (size >= 2).float().add_(1).add_(size >= 4, alpha=2).mul_(least)
    return x.div_(step).round_().mul_(step)


def in_groups(w: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """[out, in] as [out, groups, columns]: a view; the width must be divisible by the group size.

    Blocks may be narrower at the right edge: the last one is then filled up with zeros, in a copy.
    """
    missing = -w.shape[1] % scheme.block[1] if scheme.block is not None else 0
    if missing:
        w = torch.nn.functional.pad(w, (0, missing))
    return w.view(w.shape[0], scheme.groups(w.shape[1]), -1)


def from_groups(grouped: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `in_groups`: [out, groups, columns of a group] as [out, columns]."""
    return grouped.flatten(1)[:, :columns].contiguous()


def over_blocks(values: torch.Tensor, scheme: QuantScheme, reduction: str) -> torch.Tensor:
    """`values` [out, groups]; with blocks, every row of a block holds the "sum" or "amax" of its rows instead."""
    if scheme.block is None:
        return values
    rows = len(values)
    block = torch.arange(rows, device=values.device) // scheme.block[0]
    index = block[:, None].expand_as(values)
    blocks = values.new_zeros(int(block[-1]) + 1, values.shape[1])
    return blocks.scatter_reduce_(0, index, values, reduction, include_self=False)[block]


def stored(scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """`scale` as it will be read back: rounded to its storage dtype, in float32. Zero becomes 1 (an all-zero group).

    scale: of any shape. NumbersError when a finite scale is too large for that dtype; one that would be rounded to zero
    becomes the smallest there is, which errs least.
    """
    dtype = getattr(torch, scheme.scale_dtype)
    return _not_zero(_rounded(scale, dtype), scale, dtype)


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` of any shape as the storage dtype has it, in float32; NumbersError when that is infinite."""
    rounded = scale.to(dtype).float()
    if (rounded.isinf() & scale.isfinite()).any():
        raise NumbersError(
            f"a scale of {scale.abs().nan_to_num(posinf=0).max().item():g} is too large for "
            f"{str(dtype).removeprefix('torch.')}",
            hint="these weights need a checkpoint in bfloat16 or float32",
        )
    return rounded


def _not_zero(rounded: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded scales with the smallest number of their dtype instead of 0, or 1 where the exact one is 0, too.

    All of one shape, float32. Subnormal numbers only in float16: a weight over one of a wider dtype may be no number.
    """
    smallest = SMALLEST_FLOAT16 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    instead = torch.where(exact > 0, smallest, 1.0)
    return torch.where(rounded == 0, instead, rounded)


def storable(
    scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: QuantScheme, units: torch.Tensor | None = None
) -> Grid:
    """The grid whose scale is the nearest one to `scale` that the scheme can store. units: of two-level scales.

    scale, zero_point: [out, groups], the latter integers, or any numbers with two-level minima, which are rounded, too.
    """
    if scheme.scales == "plain":
        whole = stored(scale, scheme)
        if scheme.kind == "codebook":
            whole = torch.where(scale == 0, SMALLEST_FLOAT16, whole)  # no code is 0, so the scale has to be all but 0
        return Grid(whole, zero_point, scheme)
    if scheme.scales == "minimum":
        return _with_minima(scale, zero_point, scheme)
    if scheme.scales == "power-of-two":
        return Grid(power_of_two(scale, up_from=0.5**0.5), None, scheme)
    assert units is not None, "two-level scales without their units"
    if scheme.kind == "float":
        whole = (scale * units).clamp(SMALLEST_E4M3, FP8_MAX).to(torch.float8_e4m3fn).float()
        return Grid(whole / units, None, scheme, units)
    unit = units[..., 0].repeat_interleave(scheme.blocks.groups, 1)
    whole = small_scale(scale / unit, scheme.blocks).mul_(unit)
    if zero_point is None:
        return Grid(whole, None, scheme, units)
    unit = units[..., 1].repeat_interleave(scheme.blocks.groups, 1)
    minimum = (zero_point * scale / unit).round_().clamp_(0, scheme.blocks.small[1]).mul_(unit)
    return Grid(whole, minimum / whole, scheme, units)


def _with_minima(scale: torch.Tensor, zero_point: torch.Tensor | None, scheme: QuantScheme) -> Grid:
    """The grid of scales and real minima, -zero_point * scale, that are both rounded to their storage dtype."""
    assert zero_point is not None, "minima that are missing"
    minimum = _rounded(zero_point * scale, getattr(torch, scheme.scale_dtype))
    whole = stored(scale, scheme)
    return Grid(whole, minimum / whole, scheme)


def small_scale(ratio: torch.Tensor, kind: BlockType) -> torch.Tensor:
    """The small scale nearest to `ratio` that can be stored, in place; never 0, by which weights are divided."""
    if kind.step > 1:
        return ratio.sub_(1).div_(kind.step).round_().mul_(kind.step).add_(1).clamp_(*kind.small)
    rounded = ratio.round().clamp_(*kind.small)
    return ratio.copy_(torch.where(rounded == 0, torch.where(ratio < 0, -1.0, 1.0), rounded))


def power_of_two(scale: torch.Tensor, *, up_from: float) -> torch.Tensor:
    """2^e with `scale` = m * 2^e, 0.5 < m <= 1, or 2^(e - 1) where m is less than `up_from`; 1 where `scale` is 0.

    up_from 0.5 gives the power above, sqrt(0.5) the nearest by ratio. E8M0 has the exponents -127 to 127.
    scale: float32 of any shape.
    """
    mantissa, exponent = torch.frexp(scale.clamp(min=0))
    exponent = torch.where(mantissa <= max(up_from, 0.5), exponent - 1, exponent).clamp(-127, 127)
    return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), torch.ones_like(scale))


def float_unit(largest: torch.Tensor) -> torch.Tensor:
    """[1] float32: by what the E4M3 scales of a weight are divided. largest: of all its magnitudes.

    A power of two, so that every weight is exact in bfloat16: E2M1 x E4M3 has 6 significant bits. Nearly always 1024,
    whatever the weight: clients that fuse linears (q, k, v; gate, up) want one for all of them. Others only where a
    scale would leave the range of E4M3 above, or most of them its normal numbers below.
    """
    value = largest.item()
    if value == 0 or USUAL_WEIGHTS[0] <= value <= USUAL_WEIGHTS[1]:
        return largest.new_full((1,), USUAL_UNIT)
    return power_of_two(FP4_MAX * FP8_MAX / largest, up_from=1.0).reshape(1)


def row_units(scale: torch.Tensor, low: torch.Tensor | None, kind: BlockType) -> torch.Tensor:
    """[out, blocks, 1 or 2] float32: units in which the largest scale of a block, and its lowest minimum, are the
    largest small numbers; the sign of the unit brings a scale to the end of the range that reaches farther.

    scale, low: [out, groups]. As stored: float16, 1 where all are zero; the smallest number where codes have no zero.
    """
    numbers = scale[..., None] if low is None else torch.stack([scale, -low], -1)
    by_block = torch.unflatten(numbers, 1, (-1, kind.groups))
    if kind.small[0] < 0:
        largest = by_block.gather(2, by_block.abs().argmax(2, keepdim=True)).squeeze(2) / kind.small[0]
    else:
        largest = by_block.amax(2) / kind.small[1]
    each = largest / kind.factor
    sign = torch.where(each < 0, -1.0, 1.0)
    whole = _not_zero(_rounded(each.abs(), torch.float16), each.abs(), torch.float16)
    if kind.kind == "codebook":
        whole = torch.where(each == 0, SMALLEST_FLOAT16, whole)
    return whole * sign * kind.factor


def minmax_grid(w: torch.Tensor, scheme: QuantScheme) -> Grid:
    """The grid that just holds every weight of its group. w: [out, in] float32.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), for E4M3 max|w| / 448. Asymmetric: the range is extended to hold 0,
    scale = (max - min) / (2^bits - 1), zero_point = round(-min / scale). Two-level scales are rounded to the nearest,
    powers of two up. Outlier-victim pairs: outliers begin at three standard deviations.
    """
    grouped = in_groups(w, scheme)
    if scheme.kind == "outlier-victim":
        return storable(spread_scale(grouped), None, scheme)
    if not scheme.symmetric:
        return range_grid(grouped.amin(-1) + 0.0, grouped.amax(-1) + 0.0, scheme)  # no negative zeros
    if scheme.type is not None and scheme.kind != "float":
        return extreme_grid(grouped, scheme)
    # Two reductions read the weights twice; abs() would write a copy of them besides.
    largest = over_blocks(torch.maximum(grouped.amax(-1), -grouped.amin(-1)), scheme, "amax")
    scale = largest / scheme.code_max
    if scheme.scales == "power-of-two":
        scale = power_of_two(scale, up_from=0.5)
    grid = storable(scale, None, scheme, float_unit(largest.amax()) if scheme.scales == "two-level" else None)
    return _carrying(grouped, largest, grid) if scheme.kind == "float" else grid


def _carrying(grouped: torch.Tensor, largest: torch.Tensor, grid: Grid) -> Grid:
    """The grid with a power of two as scale wherever all weights of a group are numbers of the grid then.

    So are those of a source that was published as such numbers with powers of two (MXFP4 in NVFP4 or FP8). The smallest
    power that holds a group is enough: twice a number of E2M1 or E4M3 is one, as far as they reach. grouped: [out,
    groups, columns]. largest: [out, groups].
    """
    first = grouped[:1].contiguous().view(torch.int32)
    if bool((first & NO_SUCH_BITS[grid.scheme.bits]).any()):
        return grid  # nearly all weights there are
    powers = grid.with_scale(power_of_two(largest / grid.scheme.code_max, up_from=0.5))
    wrong = [(each.round(grouped) != grouped).sum(-1).float() for each in (powers, grid)]
    exact, is_exact = (over_blocks(count, grid.scheme, "sum") == 0 for count in wrong)
    return grid.where(exact & ~is_exact, powers)


def extreme_grid(grouped: torch.Tensor, scheme: QuantScheme) -> Grid:
    """The symmetric grid that has the largest weight of each group [out, groups, columns] on its smallest code.

    Codes reach farther down than up; where the largest weight is positive its scale is negative.
    """
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = extreme.abs() / scheme.code_max if scheme.vector > 1 else extreme / scheme.code_min
    units = row_units(scale, None, scheme.blocks) if scheme.has_units else None
    return storable(scale, None, scheme, units)


def range_grid(low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme, units: torch.Tensor | None = None) -> Grid:
    """The asymmetric grid for the range [low, high], each [out, groups], extended to hold 0 but for real minima.

    units: of two-level scales; chosen from this range when left out.
    """
    if scheme.scales == "minimum":
        scale = stored((high - low) / scheme.code_max, scheme)
        return storable(scale, -low / scale, scheme)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.scales == "two-level":
        scale = (high - low) / scheme.code_max
        units = row_units(scale, low, scheme.blocks) if units is None else units
        return storable(scale, torch.where(scale > 0, -low / scale, 0.0), scheme, units)
    scale = stored((high - low) / scheme.code_max, scheme)
    return Grid(scale, (-low / scale).round().clamp(0, scheme.code_max), scheme)


def code_dtype(scheme: QuantScheme) -> torch.dtype:
    """In which codes are stored, 8 bits each."""
    return torch.float8_e4m3fn if scheme.kind == "float" else torch.int8 if scheme.symmetric else torch.uint8


def to_quant_tensor(codes: torch.Tensor, grid: Grid) -> QuantTensor:
    """Codes [out, in], float32 or as stored, and their grid as a `QuantTensor`, with codes of 8 bits."""
    scheme = grid.scheme
    codes = codes.to(code_dtype(scheme))
    if scheme.scales not in ("plain", "minimum"):
        return QuantTensor(codes, *_small_scales(grid), scheme, super_scale=_stored_units(grid))
    scale = grid.scale if scheme.block is None else grid.scale[:: scheme.block[0]]
    dtype = getattr(torch, scheme.scale_dtype)
    zero_point = grid.zero_point
    if zero_point is not None:
        zero_point = (-zero_point * grid.scale).to(dtype) if scheme.has_real_minima else zero_point.to(torch.uint8)
    return QuantTensor(codes=codes, scale=scale.to(dtype), zero_point=zero_point, scheme=scheme)


def _small_scales(grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and minima as a power of two or in units: exactly what `storable` chose."""
    if grid.scheme.scales == "power-of-two":
        return (torch.frexp(grid.scale).exponent + 126).to(torch.uint8), None
    assert grid.units is not None, "two-level scales without their units"
    if grid.scheme.kind == "float":
        return (grid.scale * grid.units).to(torch.float8_e4m3fn), None
    units = grid.units.repeat_interleave(grid.scheme.blocks.groups, 1)
    small = (grid.scale / units[..., 0]).round_()
    if grid.zero_point is None:
        return small.to(torch.int8), None
    return small.to(torch.uint8), (grid.zero_point * grid.scale / units[..., 1]).round_().to(torch.uint8)


def _stored_units(grid: Grid) -> torch.Tensor | None:
    """`QuantTensor.super_scale`."""
    if grid.units is None or grid.scheme.kind == "float":
        return grid.units
    return (grid.units / grid.scheme.blocks.factor).to(torch.float16)
