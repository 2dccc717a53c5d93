"""SmoothQuant: move the range of loud input channels into the weights. Xiao et al. 2022, arXiv:2211.10438."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from outlierq.core.notes import note
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.search.site_error import SiteError
from outlierq.registry import transform
from outlierq.transform.channels import evened, nearest_powers_of_two, tied_max
from outlierq.transform.refined_scale import refined_scale

TINY, LEAST_SHARE = 1e-30, 1e-18  # weights whose inverse is near the end of float32, and the least of a column's
STEPS = 10  # of alpha on [0, 1]; the best one is refined by half a step

Candidate = tuple[float, torch.Tensor, float | None]  # predicted error, scale [in], alpha


@transform("smoothquant", needs=("abs_max", "rows", "first_rows"), paper="arXiv:2211.10438")
def smoothquant(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None = None,
    *,
    alpha: Annotated[float, Ge(0), Le(1)] | Literal["search"] = "search",
    refine_steps: Annotated[int, Ge(0)] = 60,
    power_of_two: bool = False,
) -> torch.Tensor:
    """Scale [in]: s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) (Eq. 4), relative to its geometric middle.

    alpha: 0 evens out the columns of the weights, 1 the channels of the input; `search` takes the one with the least
    predicted output error with both operands quantized (ops/search/site_error.py), no scaling among the candidates.
    refine_steps: steps of descent by which a searched scale is then refined channel by channel (refined_scale.py),
    where inputs are rounded to integers; 0 is the paper's method. power_of_two: round scales to powers of two, which
    16-bit weights absorb without any rounding.
    w: [out, in] float32, all linears that read the input, stacked. tie: [in] producer channel of every input channel,
    or None; channels with one producer get one scale. Channels that are always 0 keep scale 1; a column of zeros counts
    as the smallest other one.
    """
    family = Family(w, stats.need("abs_max"), tie, power_of_two)
    if alpha != "search":
        return family.scale(alpha)
    return searched(family, SiteError(w, stats, scheme), refine_steps)


class Family:
    """The scales of one input group, by alpha."""

    def __init__(self, w: torch.Tensor, abs_max: torch.Tensor, tie: torch.Tensor | None, power_of_two: bool):
        self.inputs, columns = tied_max(abs_max, tie), tied_max(w.abs().amax(0), tie)
        self.alive = self.inputs > 0
        self.columns = _dividing(columns)
        self.tie, self.power_of_two = tie, power_of_two

    def scale(self, alpha: float) -> torch.Tensor:
        """[in], 1 where nothing comes through."""
        return self.bounded(self.inputs**alpha / self.columns ** (1 - alpha))

    def bounded(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale [in] relative to its geometric middle, within bounds, as a power of two if that is asked for."""
        scale = evened(scale, self.alive)
        return nearest_powers_of_two(scale) if self.power_of_two else scale


def _dividing(columns: torch.Tensor) -> torch.Tensor:
    """Largest weights of the columns as divisors: a zero counts as the smallest other one, and none is so small that
    a quotient overflows. Only their ratios matter (see `evened`), so denormal ones may be divided by the largest.
    """
    largest = columns.max()
    if not largest > 0:
        return torch.ones_like(columns)
    if largest < TINY:
        columns, largest = columns / largest, torch.ones_like(largest)
    return columns.clamp(min=max(columns[columns > 0].min().item(), LEAST_SHARE * largest.item()))


def searched(family: Family, error: SiteError, refine_steps: int) -> torch.Tensor:
    """The scale [in] with the least predicted error; ones, when none errs less than no scaling. The choice is noted."""
    none = torch.ones_like(family.inputs)
    before = error(none)
    best: Candidate = (before, none, None)
    for step in range(STEPS + 1):
        best = _better(best, family, error, step / STEPS)
    if best[2] is not None:
        middle = best[2]
        for near in (middle - 0.5 / STEPS, middle + 0.5 / STEPS):
            if 0 <= near <= 1:
                best = _better(best, family, error, near)
    after, scale, alpha = best
    words = "no scaling" if alpha is None else f"alpha {alpha:.2f}"
    activations = error.scheme.activations
    if refine_steps and activations is not None and activations.kind == "int":
        refined = family.bounded(
            refined_scale(scale, error.w, error.x, error.weights, error.scheme, family.tie, steps=refine_steps)
        )
        least = error(refined)
        if least < after:
            words += f" ({after:.2g}), refined by channel"
            after, scale = least, refined
    if after >= before or not error.helps(scale):
        note(f"smoothquant: no scale lowers the predicted output error of {before:.2g}")
        return none
    note(f"smoothquant: {words}, predicted output error {before:.2g} -> {after:.2g}")
    return scale


def _better(best: Candidate, family: Family, error: SiteError, alpha: float) -> Candidate:
    """`best` (error, scale, alpha), or the candidate when it errs less."""
    scale = family.scale(alpha)
    least = error(scale)
    return (least, scale, alpha) if least < best[0] else best
