"""The least change that helps: nothing, SmoothQuant, OS+ scaling, or OS+ with a shift, by predicted output error."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Lt

from outlierq.core.move import Move
from outlierq.core.notes import collecting, note
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.search.site_error import SiteError
from outlierq.registry import transform
from outlierq.transform.os_plus import os_plus
from outlierq.transform.smoothquant import smoothquant


@transform(
    "cheapest_remedy",
    needs=("abs_max", "sum_x", "rows", "first_rows"),
    paper="arXiv:2211.10438 and arXiv:2304.09145, judged by output error",
)
def cheapest_remedy(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    tie: torch.Tensor | None = None,
    shiftable: bool = False,
    *,
    min_gain: Annotated[float, Ge(0), Lt(1)] = 0.1,
    alarm: Annotated[float, Ge(0)] = 0.01,
) -> torch.Tensor | Move:
    """The first remedy, in the order above, whose predicted output error the later ones lower by less than `min_gain`.

    All of them are folded into other weights and cost nothing at run time; they are ordered by how much of the model
    they change. w: [out, in] float32, all linears that read the input, stacked. min_gain: the share of the error that a
    remedy must save to be worth it. alarm: a relative output error above which the note advises to keep the linears in
    16 bits. The other arguments are those of `os_plus`.
    """
    remedies = _remedies(w, stats, scheme, tie, shiftable)
    least = min(error for _, _, error in remedies)
    name, move, after = next(r for r in remedies if r[2] * (1 - min_gain) <= least)
    before = remedies[0][2]
    others = ", ".join(f"{other} {error:.2g}" for other, _, error in remedies if other != name)
    if name == "none":
        note(f"nothing done: predicted output error {before:.2g}, no remedy saves {min_gain:.0%} ({others})")
    else:
        note(f"{name}: predicted output error {before:.2g} -> {after:.2g} ({others})")
    if after > alarm:
        note(f"an error of {after:.2g} is left, above {alarm:g}: consider `keep: true` in quantize.overrides")
    return move.scale if move.shift is None else move


def _remedies(
    w: torch.Tensor, stats: InputStats, scheme: QuantScheme, tie: torch.Tensor | None, shiftable: bool
) -> list[tuple[str, Move, float]]:
    """(name, move, predicted error) of every candidate, the least intrusive first."""
    error = SiteError(w, stats, scheme)
    with collecting():  # their notes would speak of choices that are not taken
        candidates = {
            "none": Move(torch.ones(w.shape[1], device=w.device)),
            "smoothquant": Move(smoothquant(w, stats, scheme, tie)),
            "os_plus": Move.of(os_plus(w, stats, scheme, tie)),
        }
        if shiftable:
            shifted = os_plus(w, stats, scheme, tie, True)
            if isinstance(shifted, Move):  # it may find that only scaling helps
                candidates["os_plus with shift"] = shifted
    return [(name, move, error(move.scale, move.shift)) for name, move in candidates.items()]
