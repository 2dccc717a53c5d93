"""Products of 16-bit inputs with grouped weights, in plain torch: the definition of the kernels for them.

A weight is rounded to the dtype of the inputs before it is multiplied, as if the checkpoint had been dequantized:
w = round16(scale * (code - zero_point)); sums are float32, the bias is added to them, and the result is rounded once.
Where a weight has one factor besides, sums are multiplied with it, and w needs no rounding.
"""

from __future__ import annotations

import torch


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """[out, in] in `dtype`. codes: [out, in]. scale, zero_point: [out, groups], groups of equal width. factor: [1]."""
    grouped = torch.unflatten(codes.float(), 1, (scale.shape[1], -1))
    if zero_point is not None:
        grouped = grouped - zero_point.float()[..., None]
    dense = (grouped * scale.float()[..., None]).flatten(1).to(dtype)
    return dense if factor is None else (dense.float() * factor).to(dtype)


def packed_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` [tokens, in] times the weight, [tokens, out] in the dtype of x. bias: [out]. factor: [1]."""
    y = x.float() @ dequantize(codes, scale, zero_point, dtype=x.dtype).float().T
    y = y if factor is None else y * factor
    return (y if bias is None else y + bias.float()).to(x.dtype)
