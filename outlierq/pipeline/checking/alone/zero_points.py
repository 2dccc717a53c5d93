"""Zero points beside the codes of their rows: a row whose groups lie beside zero more than those of any other row do.

Single groups cannot be told: in sound weights one lies 7 robust deviations from the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    import torch

    from outlierq.core.quant_tensor import QuantTensor

CHECK = "zero points"
FEWEST_GROUPS = 64
# Of ((mean code - zero point) / deviation of the codes)^2 of a row, in robust deviations: what all others keep within,
# where a stray begins, and how much farther than the farthest other it lies.
CALM, STRAY, BEYOND_OTHERS = 10.0, 14.0, 2.0
# The same, not in deviations of the linear, from which a group lies on one side of 0.
ASIDE = 1.0


@dataclass
class ZeroPoints:
    """By linear: where the farthest row is, how far it and the next one lie."""

    _strays: dict[str, tuple[str, float, float]] = field(default_factory=dict)

    def add(self, name: str, quantized: QuantTensor, findings: Findings) -> None:
        """Look at one weight [out, in] with zero points."""
        if quantized.zero_point is None or quantized.super_scale is not None:
            return
        codes = quantized.codes.float().view(*quantized.zero_point.shape, -1)
        zero = quantized.zero_point.float()
        spread = codes.std(-1)
        side = ((codes.mean(-1) - zero) / spread.clamp(min=0.5)).where(spread > 0, 0.0)
        one = bool((zero == zero.flatten()[0]).all())
        if zero.numel() >= FEWEST_GROUPS and one and side.abs().median() > ASIDE:
            findings.fault(
                CHECK, name, f"every zero point is {zero.flatten()[0]:g}, so its weights lie on one side of 0"
            )
            return
        apart = side - side.median()
        apart = apart / (1.4826 * apart.abs().median()).clamp(min=0.02)
        if len(apart) >= FEWEST_GROUPS:
            self._strays[name] = _farthest_row(apart)

    def judge(self, findings: Findings) -> None:
        """The farthest of all, where all others lie close."""
        ordered = sorted(self._strays.items(), key=lambda pair: pair[1][1])
        if not ordered:
            return
        name, (where, distance, rest) = ordered[-1]
        others = max([rest, *(stray[1] for _, stray in ordered[:-1])])
        if others <= CALM and distance > max(STRAY, BEYOND_OTHERS * others):
            what = f"its zero points do not go with the codes of {where}: {distance:.1f} deviations"
            findings.fault(CHECK, name, f"{what}, elsewhere {others:.1f}")


def _farthest_row(apart: torch.Tensor) -> tuple[str, float, float]:
    """Of `apart` [rows, groups]: where the farthest row is, how far, and how far all others. A sum of n squares is n,
    and deviates by sqrt(2 n).
    """
    rows = apart.square().sum(1)
    rows = (rows - rows.median()) / (1.4826 * (rows - rows.median()).abs().median()).clamp(min=apart.shape[1] ** 0.5)
    strays = rows > rows.max() / BEYOND_OTHERS
    if not 0 < int(strays.sum()) <= len(rows) / 8:
        return "no row", float(rows.max()), float(rows.max())
    where = f"{int(strays.sum())} rows, first {int(strays.nonzero()[0])}"
    return where, float(rows.max()), float(rows[~strays].max())
