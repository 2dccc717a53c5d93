"""Round to nearest, with the scale that errs least. No data needed; with statistics it weighs errors by the input."""

from __future__ import annotations

from typing import Literal

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.compiled.rounding import round_rows
from outlierq.ops.compiled.typed import round_types
from outlierq.ops.grid import Grid, from_groups, in_groups, minmax_grid, to_quant_tensor
from outlierq.ops.search.scale_search import search_grid
from outlierq.registry import LARGEST_SCALES, quantizer


def _at_once(
    w: torch.Tensor, scheme: QuantScheme, *, scale_search: str = "minmax"
) -> tuple[QuantTensor, float, float] | None:
    """`rtn` in one pass: where nothing is searched, and without statistics for the types of GGUF."""
    if scheme.type is not None:
        return round_types(w, scheme, searched=scale_search == "mse") if scale_search in ("minmax", "mse") else None
    return round_rows(w, scheme) if scale_search == "minmax" else None


@quantizer(
    "rtn",
    needs_if={"scale_search": {"hessian": ("hessian",), "importance": ("sum_sq",)}},
    gives_if={"scale_search": {"minmax": (LARGEST_SCALES,)}},
    paper="Gholami et al. 2021, arXiv:2103.13630, section III (uniform quantization, min-max range)",
    at_once=_at_once,
)
def rtn(
    w: torch.Tensor,
    stats: InputStats | None,
    scheme: QuantScheme,
    *,
    scale_search: Literal["minmax", "mse", "importance", "hessian"] = "minmax",
) -> QuantTensor:
    """Round every weight to the nearest point of its group's grid.

    w: [out, in] float32. scale_search: `minmax` takes the grid that just holds the group, `mse` the one with the least
    squared weight error, `importance` weighs that by the mean square of every input channel, which is what an
    importance matrix of llama.cpp holds, and `hessian` takes the one with the least output error (both need
    calibration).
    """
    grid = minmax_grid(w, scheme) if scale_search == "minmax" else _searched(w, stats, scheme, scale_search)
    return to_quant_tensor(from_groups(grid.encode(in_groups(w, scheme)), w.shape[1]), grid)


def _searched(w: torch.Tensor, stats: InputStats | None, scheme: QuantScheme, by: str) -> Grid:
    """The grid with the least error, weighed as asked."""
    if by == "mse":
        return search_grid(w, scheme, None)
    assert stats is not None, "no statistics, though this search declares that it needs them"
    if by == "hessian":
        return search_grid(w, scheme, stats.need("hessian"))
    return search_grid(w, scheme, (stats.need("sum_sq") / stats.tokens).float())
