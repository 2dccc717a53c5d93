"""`QuantTensor`: codes, scales and zero points. Its `dequantize()` is the only truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.scheme import QuantScheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantTensor:
    """A quantized weight, immutable.

    codes: [out, in] int16-or-smaller integers within the scheme's code range.
    scale: [out, groups] in the scheme's scale dtype. zero_point: [out, groups] integers, or None when symmetric.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple(self.codes.shape)

    def dequantize(self) -> torch.Tensor:
        """Float32 [out, in]: `scale * (codes - zero_point)`, each group with its own scale."""
        rows, columns = self.codes.shape
        grouped = self.codes.float().view(rows, self.scale.shape[1], -1)
        if self.zero_point is not None:
            grouped.sub_(self.zero_point.float()[..., None])
        return grouped.mul_(self.scale.float()[..., None]).view(rows, columns)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """The output rows `start:stop`; used to split a stack of linears that were solved together."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return QuantTensor(self.codes[start:stop], self.scale[start:stop], zero_point, self.scheme)

    @classmethod
    def stack(cls, pieces: Sequence[QuantTensor]) -> QuantTensor:
        """Pieces of one scheme joined along their rows; the inverse of `rows`."""
        import torch

        if len(pieces) == 1:
            return pieces[0]
        zero_points = [p.zero_point for p in pieces if p.zero_point is not None]
        return cls(
            codes=torch.cat([p.codes for p in pieces]),
            scale=torch.cat([p.scale for p in pieces]),
            zero_point=torch.cat(zero_points) if zero_points else None,
            scheme=pieces[0].scheme,
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales and zero points."""
        scale_bits = self.scale.numel() * self.scale.element_size() * 8
        zero_bits = 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.bits
        return self.scheme.bits + (scale_bits + zero_bits) / self.codes.numel()
