"""A static LLM.int8() split: int8 weights, and the columns of the outlier channels in 16 bits as they were.

The criterion is that of LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 3, but it is applied once, to the
calibration statistics, instead of to every batch: so the outlier columns need not be quantized, nothing has to be found
at run time, and a token's result does not depend on the tokens beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.twins.int8_split import THRESHOLD, choose_columns
from outlierq.quantize.rtn import rtn
from outlierq.registry import OUTLIER_COLUMNS, quantizer


@quantizer(
    "int8_split",
    needs=("min", "max", "sum_sq", "rows"),
    needs_if={"scale_search": {"hessian": ("hessian",)}},
    gives=(OUTLIER_COLUMNS,),
    paper="arXiv:2208.07339",
)
def int8_split(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    threshold: Annotated[float, Gt(0)] = THRESHOLD,
    ratio: Annotated[float, Gt(1)] = 20.0,
    min_rate: Annotated[float, Ge(0)] = 0.001,
    scale_search: Literal["minmax", "mse", "hessian"] = "minmax",
) -> QuantTensor:
    """Keep the columns of outlier channels in 16 bits and round all others to int8, without them in the scale.

    w: [out, in] float32. A channel is an outlier when it reaches `threshold`, or `ratio` times the median channel's
    largest value, in at least `min_rate` of the tokens (one huge token alone is served by its own scale). As many
    columns are kept as `ops.int8_split.column_budget` says, outliers with the largest abs_max * rms first.

    threshold: of an outlier, in the units of the input. ratio: of an outlier to the median channel. min_rate: share of
    the tokens in which it must be one. scale_search: of the int8 columns, as in `rtn`.
    """
    columns, outliers = choose_columns(stats, threshold=threshold, ratio=ratio, min_rate=min_rate)
    if outliers > len(columns):
        note(f"{outliers} outlier channels, of which the {len(columns)} that cost most stay in 16 bits")
    low = rtn(w.index_fill(1, columns, 0.0), stats, scheme, scale_search=scale_search)
    codes = low.codes if scheme.symmetric else low.codes.index_fill(1, columns, 0)
    outlier_weight = w[:, columns].to(getattr(torch, scheme.scale_dtype))
    return replace(low, codes=codes, outlier_columns=columns, outlier_weight=outlier_weight)
