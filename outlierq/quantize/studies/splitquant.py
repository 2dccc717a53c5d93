"""SplitQuant: three clusters of a layer's weights, each with its own scale. Song and Lin 2025, arXiv:2501.12428.

The paper makes three layers of them, whose outputs are added. What they store together is one code and the number of a
cluster for every weight; that is how its bits are counted here, the numbers at their entropy, which favours it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import minmax_grid
from outlierq.ops.one_dimension import k_means
from outlierq.registry import approximation


@approximation("splitquant", paper="arXiv:2501.12428")
def splitquant(
    w: torch.Tensor, stats: InputStats | None, scheme: QuantScheme, *, clusters: Annotated[int, Ge(1)] = 3
) -> Approximation:
    """Round every weight to the grid of its cluster, one asymmetric grid of the cluster's own range for all of them.

    w: [out, in] float32. clusters: of an exact k-means over all weights (on a histogram).
    """
    number = torch.bucketize(w, k_means(w.flatten(), clusters).to(w))
    values, counts = torch.empty_like(w), []
    for cluster in range(clusters):
        members = number == cluster
        counts.append(int(members.sum()))
        if counts[-1]:
            values[members] = on_own_grid(w[members], scheme)
    share = torch.tensor([count for count in counts if count], dtype=torch.float64) / w.numel()
    entropy = -(share * share.log2()).sum().item()
    return Approximation(values, scheme.bits + entropy + 32 * clusters / w.numel())


def on_own_grid(values: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """Values [n] rounded to 2^bits even steps from their least to their largest: the range need not hold 0."""
    low = values.min()
    span = (values - low)[None]
    step = minmax_grid(span, replace(scheme, group_size=None, symmetric=False)).scale.item()
    return (span[0] / step).round().clamp(0, (1 << scheme.bits) - 1) * step + low
