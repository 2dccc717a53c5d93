"""AWQ: scale up the input channels that matter before rounding. Lin et al. 2023, arXiv:2306.00978."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.grid import in_groups, minmax_grid
from outlierq.registry import transform

# Scales outside this range push outliers into the weights and into the 16-bit norm (methods sheet 1.e).
LARGEST_SCALE = 100.0


@transform("awq", needs=("hessian", "abs_mean"), paper="arXiv:2306.00978")
def awq(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None = None,
    *,
    grid_points: int = 20,
    scaling: Literal["plain", "duo", "both"] = "both",
) -> torch.Tensor:
    """Scale [in] that minimises the output error tr(D H D^T) of rounding `w * scale` and dividing it out again.

    Candidates: s = x^r ("plain", Eq. 5) and s = x^r / m^(1-r) ("duo": m is the mean weight magnitude relative to its
    group's maximum), x the mean |input| of a channel, r on a grid of [0, 1]; always the identity, so the result never
    errs more than no scaling. w: [out, in] float32, all linears that read the input, stacked.
    tie: [in] producer channel of every input channel, or None; channels with one producer get one scale (grouped-query
    attention repeats a value channel over query heads).
    """
    hessian = stats.need("hessian")
    best = torch.ones(w.shape[1], device=w.device)
    least = scaled_error(w, best, hessian, scheme)
    for scale in candidates(w, stats.need("abs_mean"), scheme, tie, grid_points, scaling):
        error = scaled_error(w, scale, hessian, scheme)
        if error < least:
            best, least = scale, error
    return best


def scaled_error(w: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme) -> float:
    """Output error of plain rounding after scaling the columns by `scale`."""
    scaled = w * scale
    grouped = in_groups(scaled, scheme)
    change = minmax_grid(scaled, scheme).round(grouped).view(w.shape).sub_(scaled).div_(scale)
    return ((change @ hessian) * change).sum().item()


def candidates(
    w: torch.Tensor,
    abs_mean: torch.Tensor,
    scheme: QuantScheme,
    tie: torch.Tensor | None,
    grid_points: int,
    scaling: str,
) -> Iterator[torch.Tensor]:
    """The scales to try, each with geometric middle 1 and dead channels left alone."""
    grouped = in_groups(w, scheme).abs()
    magnitude = (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).reshape(w.shape).mean(0)
    activity, magnitude = _tied(abs_mean, tie), _tied(magnitude, tie)
    alive = activity > 1e-6 * activity.median()
    activity = activity.clamp(min=1e-8)
    for i in range(grid_points + 1):
        r = i / grid_points
        if scaling in ("plain", "both") and i > 0:
            yield _normalised(activity**r, alive)
        if scaling in ("duo", "both"):
            yield _normalised(activity**r / (magnitude ** (1 - r) + 1e-4), alive)


def _tied(values: torch.Tensor, tie: torch.Tensor | None) -> torch.Tensor:
    """Mean of `values` [in] over the channels that share a producer channel."""
    if tie is None:
        return values
    size = int(tie.max()) + 1
    total = torch.zeros(size, device=values.device).index_add_(0, tie, values)
    count = torch.zeros(size, device=values.device).index_add_(0, tie, torch.ones_like(values))
    return (total / count.clamp(min=1))[tie]


def _normalised(scale: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Divide by sqrt(max * min) over live channels; dead channels get 1; all within [1/100, 100]."""
    living = scale[alive]
    if living.numel() == 0:
        return torch.ones_like(scale)
    scale = scale / (living.max() * living.min()).sqrt()
    return torch.where(alive, scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE), torch.ones_like(scale))
