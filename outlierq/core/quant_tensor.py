"""`QuantTensor`: codes, scales and zero points. Its `dequantize()` is the only truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from outlierq.core.scheme import QuantScheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QuantTensor:
    """A quantized weight, immutable.

    codes: [out, in] int16-or-smaller integers within the scheme's code range, or float8_e4m3fn values.
    scale: `scheme.scale_shape(out, in)` in the scheme's scale dtype: [out, groups], or one per block.
    zero_point: [out, groups] integers, or None when symmetric.
    input_scale: [1] in the scale dtype: the calibrated scale of a static activation scheme, else None.
    outlier_columns: [k] int64 ascending, input channels that stay in 16 bits; their codes are 0 and do not count.
    outlier_weight: [out, k] in the scale dtype, the original weights of those columns. Both None without a split.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme
    input_scale: torch.Tensor | None = None
    outlier_columns: torch.Tensor | None = None
    outlier_weight: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple(self.codes.shape)

    def dequantize(self) -> torch.Tensor:
        """Float32 [out, in]: `scale * (codes - zero_point)`, each group with its own scale; outlier columns as kept."""
        dense = self._blocks() if self.scheme.block is not None else self._groups()
        if self.outlier_columns is not None:
            dense[:, self.outlier_columns] = self.outlier_weight.float()
        return dense

    def _groups(self) -> torch.Tensor:
        """Scales by row and group of columns."""
        rows, columns = self.codes.shape
        grouped = self.codes.float().view(rows, self.scale.shape[1], -1)
        if self.zero_point is not None:
            grouped.sub_(self.zero_point.float()[..., None])
        return grouped.mul_(self.scale.float()[..., None]).view(rows, columns)

    def _blocks(self) -> torch.Tensor:
        """Scales by two-dimensional block; the last ones may be narrower."""
        (rows, columns), (height, width) = self.codes.shape, self.scheme.block
        spread = self.scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        return self.codes.float().mul_(spread)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """The output rows `start:stop`; used to split a stack of linears that were solved together.

        With blocks, `start` must be a multiple of the block's height.
        """
        height = self.scheme.block[0] if self.scheme.block is not None else 1
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start // height : -(-stop // height)],
            zero_point=None if self.zero_point is None else self.zero_point[start:stop],
            outlier_weight=None if self.outlier_weight is None else self.outlier_weight[start:stop],
        )

    @classmethod
    def stack(cls, pieces: Sequence[QuantTensor]) -> QuantTensor:
        """Pieces of one scheme joined along their rows; the inverse of `rows`."""
        import torch

        if len(pieces) == 1:
            return pieces[0]
        zero_points = [p.zero_point for p in pieces if p.zero_point is not None]
        kept = [p.outlier_weight for p in pieces if p.outlier_weight is not None]
        return replace(
            pieces[0],
            codes=torch.cat([p.codes for p in pieces]),
            scale=torch.cat([p.scale for p in pieces]),
            zero_point=torch.cat(zero_points) if zero_points else None,
            outlier_weight=torch.cat(kept) if kept else None,
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales, zero points and outlier columns."""
        scale_bits = self.scale.numel() * self.scale.element_size() * 8
        zero_bits = 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.bits
        kept = self.outlier_weight
        kept_bits = 0 if kept is None else kept.numel() * kept.element_size() * 8
        return self.scheme.bits + (scale_bits + zero_bits + kept_bits) / self.codes.numel()
