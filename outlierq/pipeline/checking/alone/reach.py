"""Do the codes of each group reach the end of their range, where those of all other groups do?

A scale is the largest weight of its group over the largest code, or less where a search clips, so some code of every
group is at an end. Codes that came under another scale, or from another place, break that in many groups at once.
Methods that move weights after the scale is set break it a little everywhere, which is why nothing is said then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    from outlierq.core.quant_tensor import QuantTensor

CHECK = "codes"
FEWEST_GROUPS, FEWEST_OTHERS, FEWEST_SHORT = 16, 3, 12
# A share that rounding makes is alike in all linears but for chance: deviations of a count, and some. One below 5 % may
# come from what a method does after the scale is set, and then differs by this factor at most.
STRAY, MORE, RARE, RARE_FACTOR = 6.0, 1.05, 0.05, 4.0


@dataclass
class Reach:
    """How many groups of each linear fall short, by numbers: {int4: {name: (short, all)}}."""

    _counts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)

    def add(self, name: str, quantized: QuantTensor, findings: Findings) -> None:
        """Look at one weight [out, in]."""
        if quantized.scheme.block is not None:
            return
        codes = quantized.codes.float().view(len(quantized.codes), quantized.scale.shape[1], -1)
        lowest, highest = codes.amin(-1), codes.amax(-1)
        _check_alike(name, quantized, lowest, highest, findings)
        # A group of one value, zeros among them, may have any code.
        busy = lowest != highest
        short = busy & _falls_short(quantized, lowest, highest)
        kind = f"{quantized.scheme.numbers} {quantized.zero_point is None}"
        self._counts.setdefault(kind, {})[name] = int(short.sum()), int(busy.sum())

    def judge(self, findings: Findings) -> None:
        """Linears in which more groups fall short than the others let expect."""
        for counts in self._counts.values():
            for name, (short, count) in counts.items():
                others = [pair for other, pair in counts.items() if other != name and pair[1] >= FEWEST_GROUPS]
                if len(others) < FEWEST_OTHERS or count < FEWEST_GROUPS:
                    continue
                most = _most_expected(count, others)
                if short > most:
                    what = f"in {short} of its {count} groups no code is at an end of the range"
                    findings.fault(CHECK, name, f"{what}; by the other linears, {most:.0f} at most")


def _most_expected(count: int, others: list[tuple[int, int]]) -> float:
    """The most groups of `count` that may fall short, by (short, all) of other linears."""
    largest: float = max(short / of for short, of in others)
    if largest < RARE:  # left by a method that moves weights: as uneven as the weights are
        return RARE_FACTOR * largest * count + FEWEST_SHORT
    expected: float = count * max(_least_share(*pair) for pair in others)
    return MORE * expected + STRAY * math.sqrt(expected) + FEWEST_SHORT


def _least_share(short: int, count: int) -> float:
    """The share of a linear, less what chance adds to the largest of many."""
    return max(0.0, short - 2 * math.sqrt(short)) / count


def _falls_short(quantized: QuantTensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """[out, groups] whether no code is at an end; of grids with zero points and no minima, at both ends."""
    scheme = quantized.scheme
    if quantized.zero_point is not None:
        return (lowest > 0) | (highest < scheme.code_max)
    # Scales that are powers of two leave up to half of the range.
    end = scheme.code_max / 1.5 if scheme.scales == "power-of-two" else scheme.code_max
    return torch.maximum(-lowest, highest) < end


def _check_alike(
    name: str, quantized: QuantTensor, lowest: torch.Tensor, highest: torch.Tensor, findings: Findings
) -> None:
    """One code everywhere under scales that differ: the codes were lost."""
    one = bool((lowest == lowest.flatten()[0]).all()) and bool((highest == lowest.flatten()[0]).all())
    scales = quantized.float_scale.abs()
    if one and scales.numel() >= FEWEST_GROUPS and scales.unique().numel() >= FEWEST_GROUPS:
        findings.fault(CHECK, name, f"every code is {lowest.flatten()[0]:g}, under {scales.unique().numel()} scales")
