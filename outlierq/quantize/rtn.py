"""Round to nearest, with the scale that errs least. No data needed; with statistics it weighs errors by the input."""

from __future__ import annotations

from typing import Literal

import torch

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.compiled.rounding import round_rows
from outlierq.ops.compiled.typed import round_types
from outlierq.ops.grid import from_groups, in_groups, minmax_grid, to_quant_tensor
from outlierq.ops.outlier_victim import curvatures
from outlierq.ops.search.scale_search import group_blocks, improved
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
    blocks = _blocks(stats, scheme, scale_search)
    grid = minmax_grid(w, scheme)
    if scale_search != "minmax":
        grid = improved(w, grid, blocks)
    codes = grid.encode(in_groups(w, scheme), curvatures(blocks, scheme))
    return to_quant_tensor(from_groups(codes, w.shape[1]), grid)


def _blocks(stats: InputStats | None, scheme: QuantScheme, by: str) -> torch.Tensor | None:
    """What errors count by, as `group_blocks` has it; None where all weights count alike."""
    if by in ("minmax", "mse"):
        return None
    assert stats is not None, "no statistics, though this search declares that it needs them"
    by_input = stats.need("hessian") if by == "hessian" else (stats.need("sum_sq") / stats.tokens).float()
    return group_blocks(by_input, scheme)
