"""Grids of integers or of E4M3 floats: scales, zero points and rounding, defined once for every method.

A scheme with two-dimensional blocks is handled as groups of columns whose scale is the same in all rows of a block, so
that every method works with it; `over_blocks` is what makes the rows of a block agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from outlierq.core.errors import NumbersError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme


@dataclass(frozen=True)
class Grid:
    """One scale and zero point per (row, group). scale: [out, groups] float32, already rounded to the storage dtype.

    zero_point: [out, groups] float32 integers, or None when the scheme is symmetric. With blocks, the rows of a block
    hold the same scale.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme

    def encode(self, grouped: torch.Tensor) -> torch.Tensor:
        """Float32 codes of `grouped` [out, groups, columns]: nearest code, clamped to the range."""
        zero_point = None if self.zero_point is None else self.zero_point[..., None]
        return nearest_code(grouped / self.scale[..., None], zero_point, self.scheme)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Float32 weights of `codes` [out, groups, columns]."""
        if self.zero_point is not None:
            codes = codes - self.zero_point[..., None]
        return codes * self.scale[..., None]

    def round(self, grouped: torch.Tensor) -> torch.Tensor:
        """The nearest grid value of every weight."""
        return self.decode(self.encode(grouped))

    def where(self, better: torch.Tensor, other: Grid) -> Grid:
        """This grid, with `other`'s values at the [out, groups] places where `better` is true."""
        zero_point = None
        if self.zero_point is not None:
            zero_point = torch.where(better, other.zero_point, self.zero_point)
        return replace(self, scale=torch.where(better, other.scale, self.scale), zero_point=zero_point)

    def per_column(self, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point of every weight, [out, in]."""
        repeat = self.scheme.columns_per_group(columns)
        zero_point = None if self.zero_point is None else self.zero_point.repeat_interleave(repeat, dim=1)
        return self.scale.repeat_interleave(repeat, dim=1)[:, :columns], zero_point


def nearest_code(ratio: torch.Tensor, zero_point: torch.Tensor | None, scheme: QuantScheme) -> torch.Tensor:
    """The code nearest to `ratio` = weight / scale, in float32 and in place: round to even, saturate at the range."""
    if scheme.kind == "float":
        # Clamped first: the cast has no infinity to saturate to, it would give NaN.
        return ratio.copy_(ratio.clamp_(scheme.code_min, scheme.code_max).to(torch.float8_e4m3fn))
    ratio.round_()
    if zero_point is not None:
        ratio.add_(zero_point)
    return ratio.clamp_(scheme.code_min, scheme.code_max)


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

    NumbersError when a finite scale is too large for that dtype.
    """
    rounded = scale.to(getattr(torch, scheme.scale_dtype)).float()
    if (rounded.isinf() & scale.isfinite()).any():
        raise NumbersError(
            f"a scale of {scale.abs().nan_to_num(posinf=0).max().item():g} is too large for {scheme.scale_dtype}",
            hint="these weights need a checkpoint in bfloat16 or float32",
        )
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def minmax_grid(w: torch.Tensor, scheme: QuantScheme) -> Grid:
    """The grid that just holds every weight of its group. w: [out, in] float32.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), for E4M3 max|w| / 448. Asymmetric: the range is extended to hold 0,
    scale = (max - min) / (2^bits - 1), zero_point = round(-min / scale).
    """
    grouped = in_groups(w, scheme)
    if scheme.symmetric:
        largest = over_blocks(grouped.abs().amax(-1), scheme, "amax")
        return Grid(stored(largest / scheme.code_max, scheme), None, scheme)
    return range_grid(grouped.amin(-1), grouped.amax(-1), scheme)


def range_grid(low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme) -> Grid:
    """The asymmetric grid for the range [low, high], each [out, groups], extended to hold 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored((high - low) / scheme.code_max, scheme)
    return Grid(scale, (-low / scale).round().clamp(0, scheme.code_max), scheme)


def to_quant_tensor(codes: torch.Tensor, grid: Grid) -> QuantTensor:
    """Float32 codes [out, in] and their grid as a `QuantTensor`, with codes of 8 bits."""
    scheme = grid.scheme
    integer = torch.int8 if scheme.symmetric else torch.uint8
    scale = grid.scale if scheme.block is None else grid.scale[:: scheme.block[0]]
    return QuantTensor(
        codes=codes.to(torch.float8_e4m3fn if scheme.kind == "float" else integer),
        scale=scale.to(getattr(torch, scheme.scale_dtype)),
        zero_point=None if grid.zero_point is None else grid.zero_point.to(torch.uint8),
        scheme=scheme,
    )
