"""int8 matrix products with a few input channels in 16 bits: LLM.int8() (arXiv:2208.07339), in plain torch.

This is the reference that every faster version follows. A token's values and a weight row's values share one scale each
(vector-wise quantization, section 2.1 of the paper); the products are summed in int32, scaled, and the 16-bit product
of the outlier columns O is added (Eq. 8):

    y[t, o] = s_x[t] * s_w[o] * sum over c not in O of X[t, c] * W[o, c]  +  sum over c in O of x[t, c] * w[o, c]

with X = round(x / s_x), s_x[t] = max over c not in O of |x[t, c]| / 127. Sums are float32; y has the dtype of x.

Two ways to find O. Dynamic, as in the paper: every column in which any token of this call reaches the threshold; what a
token gets then depends on the tokens beside it. Static: fixed columns, chosen once from calibration, whose weights are
kept as they were.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError
from outlierq.core.scheme import ActivationScheme
from outlierq.core.stats import InputStats
from outlierq.ops.activations import dynamic_scale

THRESHOLD = 6.0
PER_TOKEN = ActivationScheme()
# A static split keeps at most this share of the channels in 16 bits, but at least so many, in whole tiles of a kernel.
MAX_SHARE = 0.005
MIN_COLUMNS = 8
COLUMN_TILE = 16


def column_budget(in_features: int) -> int:
    """How many columns a static split of this width keeps in 16 bits: known before any weight is read."""
    least = max(MIN_COLUMNS, int(MAX_SHARE * in_features))
    return min(in_features, -(-least // COLUMN_TILE) * COLUMN_TILE)


def choose_columns(stats: InputStats, *, threshold: float, ratio: float, min_rate: float) -> tuple[torch.Tensor, int]:
    """([k] ascending columns to keep in 16 bits, how many outlier channels there are); options: see `int8_split`.

    Outlier channels come first; what is left of the budget goes to the others. Among equals those with the largest
    abs_max * rms win. Weights have no say, so that all linears that read one input keep the same columns; weighing with
    the norms of the columns gave no better model.
    """
    largest, tokens = stats.need("abs_max"), stats.tokens
    if not tokens:
        raise StatsError("no token reached this input, so its outliers are not known", hint="calibrate with more text")
    level = min(threshold, ratio * largest.median().item())
    rate = (stats.need("rows").float().abs() >= level).float().mean(0)
    outlier = (largest >= level) & (rate >= min_rate)
    rms = (stats.need("sum_sq") / tokens).sqrt().float()
    cost = largest * rms
    order = torch.argsort(torch.where(outlier, cost + cost.max(), cost), descending=True, stable=True)
    return order[: column_budget(len(cost))].sort().values, int(outlier.sum())


def split_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    columns: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Static split: `x` [..., in] times the weight, [..., out]. Without columns it is plain vector-wise int8.

    codes: [out, in] int8; those of the columns do not count. scale: [out, 1]. columns: [k] int64, weight: [out, k].
    """
    low = x.reshape(-1, x.shape[-1]).float()
    if columns is None or columns.numel() == 0:
        y = vectorwise_product(low, codes, scale)
    else:
        assert weight is not None, "columns in 16 bits without their weight"
        y = vectorwise_product(low.index_fill(1, columns, 0.0), codes, scale)
        y += low[:, columns] @ weight.float().T
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def dynamic_split_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    threshold: float = THRESHOLD,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """LLM.int8(): columns of `x` [..., in] in which any |x| >= threshold are multiplied in 16 bits; 0 means none are.

    weight: [out, in] as it was before quantization (the paper). Without it the outlier columns, too, use the weight
    that the codes stand for: bitsandbytes keeps no other (0.50, `has_fp16_weights=False`). As there, a token's scale
    leaves out its values above the threshold, not the whole outlier columns, and what becomes int8 is rounded to
    float16 first (nothing changes for bfloat16 inputs but tiny ones; an overflow is above the threshold).
    """
    flat = x.reshape(-1, x.shape[-1]).float()
    low = flat.half().float()
    large = low.abs() >= threshold if threshold > 0 else torch.zeros_like(low, dtype=torch.bool)
    columns = large.any(0).nonzero().flatten()
    row_scale = dynamic_scale(low.masked_fill(large, 0.0), PER_TOKEN)
    y = vectorwise_product(low.index_fill(1, columns, 0.0), codes, scale, row_scale)
    if columns.numel():
        outlier_weight = codes[:, columns].float() * scale.float() if weight is None else weight[:, columns].float()
        y += flat[:, columns] @ outlier_weight.T
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


def vectorwise_product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, row_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Float32 [tokens, out]: `x` [tokens, in] in int8 with one scale per token, times int8 `codes` with one per row.

    row_scale: [tokens, 1], by default what just holds each token (1 where all its values are 0).
    """
    if row_scale is None:
        row_scale = dynamic_scale(x, PER_TOKEN)
    # No clamping: the scale holds the largest value, so nothing rounds above 127.
    rounded = (x / row_scale).round_().to(torch.int8)
    return int8_product(rounded, codes).float() * (row_scale * scale.float().view(1, -1))


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact int32 product a @ b^T of int8 matrices [tokens, in] and [out, in]."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.T)
    # CUDA's _int_mm wants multiples of 8 and more than 16 rows. Float64 holds every such sum exactly, for any shape.
    return (a.double() @ b.double().T).to(torch.int32)
