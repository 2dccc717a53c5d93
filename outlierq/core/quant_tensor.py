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

    codes: [out, in] int16-or-smaller integers within the scheme's code range, or float8_e4m3fn values (which hold
    those of E2M1, too).
    scale: `scheme.scale_shape(out, in)` in the scheme's scale dtype: [out, groups], or one per block. Power-of-two
    scales are uint8 exponents plus 127; two-level ones float8_e4m3fn, uint8 beside zero_point (uint8 minima), or int8.
    zero_point: [out, groups] integers, or None when symmetric; with `scales` "minimum" the smallest values, float16.
    input_scale: [1] in the scale dtype: the calibrated scale of a static activation scheme, else None.
    outlier_columns: [k] int64 ascending, input channels that stay in 16 bits; their codes are 0 and do not count.
    outlier_weight: [out, k] in the scale dtype, the original weights of those columns. Both None without a split.
    super_scale: of two-level scales, else None. Float32 [1], by which E4M3 scales are divided; or float16
    [out, blocks, 2], the units of scales and of minima in every block of groups ([out, blocks, 1] without minima).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    scheme: QuantScheme
    input_scale: torch.Tensor | None = None
    outlier_columns: torch.Tensor | None = None
    outlier_weight: torch.Tensor | None = None
    super_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> torch.Tensor:
        """Float32 [out, in]: `scale * (codes - zero_point)`, each group with its own scale; outlier columns as kept.

        With two-level minima `scale * codes - minimum`, with plain ones `scale * codes + minimum`.
        """
        dense = self._groups() if self.scheme.block is None else self._blocks(*self.scheme.block)
        if self.outlier_columns is not None:
            assert self.outlier_weight is not None, "outlier columns without their weights"
            dense[:, self.outlier_columns] = self.outlier_weight.float()
        return dense

    def _groups(self) -> torch.Tensor:
        """Scales by row and group of columns."""
        rows, columns = self.codes.shape
        grouped = self.codes.float().view(rows, self.scale.shape[1], -1)
        if self._row_units is not None:
            scale, minimum = self._in_units(self._row_units)
            grouped.mul_(scale[..., None])
            return (grouped if minimum is None else grouped.sub_(minimum[..., None])).view(rows, columns)
        if self.scheme.scales == "minimum":
            assert self.zero_point is not None, "minima that are missing"
            grouped.mul_(self.scale.float()[..., None]).add_(self.zero_point.float()[..., None])
            return grouped.view(rows, columns)
        if self.zero_point is not None:
            grouped.sub_(self.zero_point.float()[..., None])
        return grouped.mul_(self.float_scale[..., None]).view(rows, columns)

    @property
    def float_scale(self) -> torch.Tensor:
        """The numbers that `scale` stands for, float32."""
        import torch

        if self.scheme.scales == "power-of-two":
            return torch.ldexp(torch.ones_like(self.scale, dtype=torch.float32), self.scale.int() - 127)
        if self.super_scale is None:
            return self.scale.float()
        if self._row_units is not None:
            return self._in_units(self._row_units)[0]
        return self.scale.float() / self.super_scale

    @property
    def _row_units(self) -> torch.Tensor | None:
        """The units of scales and minima that are two-level integers: they differ by row."""
        return self.super_scale if self.super_scale is not None and self.super_scale.ndim > 1 else None

    def _in_units(self, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two-level scales and minima, each [out, groups] float32; the products are exact."""
        units = units.float().repeat_interleave(self.scale.shape[1] // units.shape[1], 1)
        scale = units[..., 0] * self.scheme.blocks.factor * self.scale.float()
        return scale, None if self.zero_point is None else units[..., 1] * self.zero_point.float()

    def _blocks(self, height: int, width: int) -> torch.Tensor:
        """Scales by two-dimensional block; the last ones may be narrower."""
        rows, columns = self.codes.shape
        spread = self.scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        return self.codes.float().mul_(spread)

    def rows(self, start: int, stop: int) -> QuantTensor:
        """The output rows `start:stop`; used to split a stack of linears that were solved together.

        With blocks, `start` must be a multiple of the block's height.
        """
        height = self.scheme.block[0] if self.scheme.block is not None else 1
        units = self._row_units
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start // height : -(-stop // height)],
            zero_point=None if self.zero_point is None else self.zero_point[start:stop],
            outlier_weight=None if self.outlier_weight is None else self.outlier_weight[start:stop],
            super_scale=self.super_scale if units is None else units[start:stop],
        )

    @classmethod
    def stack(cls, pieces: Sequence[QuantTensor]) -> QuantTensor:
        """Pieces of one scheme joined along their rows; the inverse of `rows`.

        Where one super scale holds for the whole weight, it must be that of all pieces.
        """
        import torch

        if len(pieces) == 1:
            return pieces[0]
        zero_points = [p.zero_point for p in pieces if p.zero_point is not None]
        outlier_weights = [p.outlier_weight for p in pieces if p.outlier_weight is not None]
        units = [p._row_units for p in pieces if p._row_units is not None]
        whole = {p.super_scale.item() for p in pieces if p.super_scale is not None and p._row_units is None}
        assert len(whole) < 2, "pieces with one super scale each"
        return replace(
            pieces[0],
            codes=torch.cat([p.codes for p in pieces]),
            scale=torch.cat([p.scale for p in pieces]),
            zero_point=torch.cat(zero_points) if zero_points else None,
            outlier_weight=torch.cat(outlier_weights) if outlier_weights else None,
            super_scale=torch.cat(units) if units else pieces[0].super_scale,
        )

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales, zero points and outlier columns."""
        if self.scheme.type is not None:
            return self.scheme.blocks.bits_per_weight
        widths = (6, 6) if self._row_units is not None else (self.scale.element_size() * 8, self.scheme.bits)
        stored = self.scale.numel() * widths[0]
        stored += 0 if self.zero_point is None else self.zero_point.numel() * widths[1]
        for whole in (self.outlier_weight, self.super_scale):
            stored += 0 if whole is None else whole.numel() * whole.element_size() * 8
        return self.scheme.bits + stored / self.codes.numel()
