"""Round to nearest on a grid that leaves out the ends of each group's range. An example; no paper is behind it."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Le

from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import from_groups, in_groups, minmax_grid, to_quant_tensor
from outlierq.registry import quantizer


@quantizer("clipped", paper="none: an example")
def clipped(
    w: torch.Tensor, stats: InputStats | None, scheme: QuantScheme, *, share: Annotated[float, Gt(0), Le(1)] = 0.9
) -> QuantTensor:
    """Round to nearest; what lies outside of a share of the range is clipped to its ends.

    w: [out, in] float32. share: of the largest weight of a group, that the grid just holds. A finer grid for all other
    weights is bought with a larger error of the few at the ends.
    """
    grid = minmax_grid(w * share, scheme)
    return to_quant_tensor(from_groups(grid.encode(in_groups(w, scheme)), w.shape[1]), grid)
