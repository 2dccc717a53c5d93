"""Integer grids: scales, zero points and rounding, defined once for every method (methods sheet, section 0.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme


@dataclass(frozen=True)
class Grid:
    """One scale and zero point per (row, group). scale: [out, groups] float32, already rounded to the storage dtype.

    zero_point: [out, groups] float32 integers, or None when the scheme is symmetric.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme

    def encode(self, grouped: torch.Tensor) -> torch.Tensor:
        """Float32 codes of `grouped` [out, groups, columns]: nearest code, clamped to the range."""
        codes = (grouped / self.scale[..., None]).round_()
        if self.zero_point is not None:
            codes += self.zero_point[..., None]
        return codes.clamp_(self.scheme.code_min, self.scheme.code_max)

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
        repeat = columns // self.scale.shape[1]
        zero_point = None if self.zero_point is None else self.zero_point.repeat_interleave(repeat, dim=1)
        return self.scale.repeat_interleave(repeat, dim=1), zero_point


def in_groups(w: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """View [out, in] as [out, groups, columns]; the width must be divisible by the group size."""
    return w.view(w.shape[0], scheme.groups(w.shape[1]), -1)


def stored(scale: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """`scale` as it will be read back: rounded to its storage dtype, in float32. Zero becomes 1 (an all-zero group)."""
    rounded = scale.to(getattr(torch, scheme.scale_dtype)).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def minmax_grid(w: torch.Tensor, scheme: QuantScheme) -> Grid:
    """The grid that just holds every weight of its group. w: [out, in] float32.

    Symmetric: scale = max|w| / (2^(bits-1) - 1). Asymmetric: the range is extended to hold 0,
    scale = (max - min) / (2^bits - 1), zero_point = round(-min / scale).
    """
    grouped = in_groups(w, scheme)
    if scheme.symmetric:
        return Grid(stored(grouped.abs().amax(-1) / scheme.code_max, scheme), None, scheme)
    return range_grid(grouped.amin(-1), grouped.amax(-1), scheme)


def range_grid(low: torch.Tensor, high: torch.Tensor, scheme: QuantScheme) -> Grid:
    """The asymmetric grid for the range [low, high], each [out, groups], extended to hold 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored((high - low) / scheme.code_max, scheme)
    return Grid(scale, (-low / scale).round().clamp(0, scheme.code_max), scheme)


def to_quant_tensor(codes: torch.Tensor, grid: Grid) -> QuantTensor:
    """Pack float codes [out, in] and their grid into a `QuantTensor` with integer codes."""
    scheme = grid.scheme
    integer = torch.int8 if scheme.symmetric else torch.uint8
    return QuantTensor(
        codes=codes.to(integer),
        scale=grid.scale.to(getattr(torch, scheme.scale_dtype)),
        zero_point=None if grid.zero_point is None else grid.zero_point.to(torch.uint8),
        scheme=scheme,
    )
