"""Outlier Suppression+: centre each channel, then scale what passes a threshold. Wei et al. 2023, arXiv:2304.09145."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from outlierq.core.move import Move
from outlierq.core.notes import note
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.search.site_error import SiteError
from outlierq.registry import transform
from outlierq.transform.channels import LARGEST_SCALE, nearest_powers_of_two, tied_max

# A threshold below the quietest channel changes nothing more; one below this share of the largest would pass the bound.
SMALLEST_SHARE = 1 / LARGEST_SCALE
GOLDEN = (math.sqrt(5) - 1) / 2
GOLDEN_STEPS = 6


@transform("os_plus", needs=("abs_max", "sum_x", "rows", "first_rows"), paper="arXiv:2304.09145")
def os_plus(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None = None,
    shiftable: bool = False,
    *,
    shift: Literal["auto", "never"] = "auto",
    grid_points: Annotated[int, Ge(2)] = 32,
    power_of_two: bool = False,
) -> torch.Tensor | Move:
    """Shift z_j = (max_j + min_j) / 2 (Eq. 2) and scale s_j(t) = max(1, max_j / t, -min_j / t) (Eq. 10) of an input.

    The threshold t is searched on a logarithmic grid up to the largest |x|, then by golden section, for the least
    predicted output error with both operands quantized (ops/search/site_error.py); of equal ones the larger wins,
    and no change at all is a candidate. Channels within t keep scale 1.

    shiftable: something can absorb the shift. shift: `auto` shifts when that errs less, `never` only scales.
    grid_points: thresholds on the grid. power_of_two: round scales to powers of two. w: [out, in] float32, all
    linears that read the input, stacked. tie: [in] producer channel of every input channel, or None; channels with one
    producer get one scale and one shift.
    """
    error = SiteError(w, stats, scheme)
    before = error(torch.ones_like(stats.need("abs_max")))
    scaled = Threshold(stats, error, tie, None, power_of_two).searched(grid_points)
    if shiftable and shift == "auto":
        centre = centres(stats, tie)
        shifted = Threshold(stats, error, tie, centre, power_of_two).searched(grid_points)
        if shifted[0] < min(scaled[0], before) and error.helps(shifted[1], centre):
            note(_sentence(before, shifted, f"shifts of up to {centre.abs().max().item():.3g}, "))
            return Move(shifted[1], centre)
    if scaled[0] >= before or not error.helps(scaled[1]):
        note(f"os_plus: no threshold lowers the predicted output error of {before:.2g}")
        return torch.ones_like(scaled[1])
    note(_sentence(before, scaled, ""))
    return scaled[1]


def _sentence(before: float, candidate: tuple[float, torch.Tensor, float], shifts: str) -> str:
    after, _, threshold = candidate
    return f"os_plus: {shifts}threshold {threshold:.3g}, predicted output error {before:.2g} -> {after:.2g}"


def centres(stats: InputStats, tie: torch.Tensor | None) -> torch.Tensor:
    """[in] the middle between the extremes of each channel, over all channels with the same producer."""
    return (tied_max(stats.need("max"), tie) - tied_max(-stats.need("min"), tie)) / 2


class Threshold:
    """The scales of one input group by threshold, after a shift (or None)."""

    def __init__(
        self,
        stats: InputStats,
        error: SiteError,
        tie: torch.Tensor | None,
        shift: torch.Tensor | None,
        power_of_two: bool,
    ):
        low, high = stats.need("min"), stats.need("max")
        if shift is not None:
            low, high = low - shift, high - shift
        self.reach = tied_max(high.maximum(-low), tie)  # [in] max |x - z|
        self.error, self.shift, self.power_of_two = error, shift, power_of_two

    def scale(self, threshold: float) -> torch.Tensor:
        """[in], 1 for channels within the threshold."""
        scale = (self.reach / threshold).clamp(1, LARGEST_SCALE)
        return nearest_powers_of_two(scale) if self.power_of_two else scale

    def searched(self, grid_points: int) -> tuple[float, torch.Tensor, float]:
        """(predicted error, scale [in], threshold) of the best threshold."""
        largest = self.reach.max().item()
        if largest == 0:
            return self._at(1.0)
        alive = self.reach[self.reach > 0]
        span = math.log(max(alive.min().item() / largest, SMALLEST_SHARE))
        places = [i / (grid_points - 1) for i in range(grid_points)]
        tried = {place: self._at(largest * math.exp(span * place)) for place in places}
        best = min(tried, key=lambda place: tried[place][0])
        step = places[1]
        finer = self._golden(largest, span, max(0.0, best - step), min(1.0, best + step))
        return finer if finer[0] < tried[best][0] else tried[best]

    def _golden(self, largest: float, span: float, left: float, right: float) -> tuple[float, torch.Tensor, float]:
        """The best of some golden section steps between two places of the logarithmic axis."""

        def at(place: float) -> tuple[float, torch.Tensor, float]:
            return self._at(largest * math.exp(span * place))

        inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        one, other = at(inner), at(outer)
        for _ in range(GOLDEN_STEPS):
            if one[0] <= other[0]:
                right, outer, other = outer, inner, one
                inner = right - GOLDEN * (right - left)
                one = at(inner)
            else:
                left, inner, one = inner, outer, other
                outer = left + GOLDEN * (right - left)
                other = at(outer)
        return one if one[0] <= other[0] else other

    def _at(self, threshold: float) -> tuple[float, torch.Tensor, float]:
        """(predicted error, scale, threshold)."""
        scale = self.scale(threshold)
        return self.error(scale, self.shift), scale, threshold
