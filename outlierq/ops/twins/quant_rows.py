"""Tokens as int8 with one scale each, outlier columns apart: the first half of an int8 product with 16-bit columns.

Vector-wise quantization of LLM.int8() (arXiv:2208.07339, section 2.1) with a fixed set of outlier columns O:

    scale[t] = max over c not in O of |x[t, c]| / 127      codes[t, c] = round(x[t, c] / scale[t]), 0 for c in O
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outlierq.ops.activations import SMALLEST
from outlierq.ops.twins.int8_split import int8_product

CODE_MAX = 127.0


def quant_rows(
    x: torch.Tensor, columns: torch.Tensor | None = None, pitch: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes int8 [tokens, in], scale float32 [tokens], outliers [tokens, pitch]) of `x` [tokens, in].

    columns: [k] different indices into `in`. pitch: columns of `outliers`, k by default; those past k are 0.
    A token whose largest value is 0, or too small for a normal scale, has scale 1. A token with a NaN or an infinity
    gets a scale that is neither finite nor hidden: every product with it is NaN. Its codes are unspecified.
    """
    count = 0 if columns is None else columns.numel()
    outliers = x.new_zeros(x.shape[0], count if pitch is None else pitch)
    low = x.float()
    if columns is not None:
        outliers[:, :count] = x[:, columns.long()]
        low = low.index_fill(1, columns.long(), 0.0)
    scale = low.abs().amax(1) / CODE_MAX
    scale = torch.where(scale < SMALLEST, torch.ones_like(scale), scale)
    codes = (low / scale[:, None]).round_().nan_to_num_(0.0).to(torch.int8)
    return codes, scale, outliers


@dataclass(frozen=True)
class SplitOperands:
    """What an int8 product with outlier columns apart is made of.

    x: int8 [tokens, in] and scale_x: float32 [tokens] or [1]. codes: int8 [out, in] and scale: float32 [out].
    outliers: [tokens, k] and outlier_weight: [out, k], both or none; bias: [out] or None; these in 16 bits.
    """

    x: torch.Tensor
    scale_x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    outliers: torch.Tensor | None = None
    outlier_weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def outlier_matmul(given: SplitOperands, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The second half (Eq. 8): int8 product, scaled, plus the 16-bit product of the outlier columns; [tokens, out].

    Sums are exact in int32, then float32; one rounding.
    """
    y = int8_product(given.x, given.codes).float() * (given.scale_x.view(-1, 1) * given.scale.view(1, -1))
    if given.outliers is not None:
        assert given.outlier_weight is not None, "outlier columns without their weight"
        y += given.outliers.float() @ given.outlier_weight.float().T
    return (y if given.bias is None else y + given.bias.float()).to(dtype)
