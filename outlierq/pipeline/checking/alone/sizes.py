"""Is a tensor, or a row, as large as its kin? Judged by how far all others of the checkpoint stray, never by a size.

A weight of any size is a weight. But where every other tensor is as large as those of its role in other blocks, or
every other row of a checkpoint lies close to the median of its linear, one that does not was scaled. Trained models
have long tails (a row of SmolLM2-135M lies 40 deviations from its median): where anything else strays, too, nothing is
said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outlierq.pipeline.checking.finding import Findings

if TYPE_CHECKING:
    import torch

CHECK = "sizes"
# Robust deviations: what all others must keep within, and where a stray begins; it must lie farther than this many
# times the farthest other.
CALM, STRAY, BEYOND_OTHERS = 6.5, 8.0, 2.0
# The same of whole tensors, of which there are few.
STRAY_TENSOR, BEYOND_TENSORS = 8.0, 2.5
# Least deviation (log2) taken for one, and least distance of a stray: sampling alone gives the first.
LEAST_DEVIATION, LEAST_DISTANCE = 0.02, 0.45
FEWEST_TENSORS, FEWEST_ROWS = 8, 16
# Of its rows, strays are a minority: one in three is a part of the weight, not an accident.
MOST_STRAYS = 1 / 3
# Factor between a table (embedding, head) and the usual linear that no model has.
LARGEST_TABLE = 300.0


@dataclass
class Sizes:
    """Sizes of all tensors and rows, log2. Half-norms: (mean of sqrt |w|)^2, which a few outliers hardly move."""

    tensors: dict[str, tuple[float, float]] = field(default_factory=dict)
    _rows: dict[str, tuple[int, int, float, float]] = field(default_factory=dict)

    def add(self, name: str, tensor: torch.Tensor, constant: torch.Tensor | None = None) -> None:
        """A vector, or a matrix [out, in]. constant: [out] rows that are not judged, of which a part is all alike."""
        roots = tensor.abs().sqrt()
        size = roots.mean().square()
        if size > 0:
            noise = 2.0 / math.log(2) * (roots.var(correction=0) / (size * roots.numel())).sqrt()
            self.tensors[name] = size.log2().item(), noise.item()
        if tensor.ndim == 2 and len(tensor) >= FEWEST_ROWS and size > 0:
            self._rows[name] = _strays(roots.mean(1).square(), constant)

    def judge(self, quantized: Collection[str], findings: Findings) -> None:
        """Say what strays. quantized: names of the linears whose rows are judged."""
        self._judge_rows([name for name in self._rows if name in quantized], findings)
        self._judge_tensors(findings)
        self._judge_tables(quantized, findings)

    def _judge_rows(self, names: list[str], findings: Findings) -> None:
        farthest = sorted(names, key=lambda name: self._rows[name][2])
        if len(farthest) < 2:
            return
        name = farthest[-1]
        row, count, distance, rest = self._rows[name]
        others = max(rest, self._rows[farthest[-2]][2])
        if count and others <= CALM and distance > max(STRAY, BEYOND_OTHERS * others):
            what = (
                f"{count} of its rows are of another size than all others, first row {row}: {distance:.0f} deviations "
                f"from the median, where no other row of any linear is farther than {others:.1f}"
            )
            findings.fault(CHECK, name, what)

    def _judge_tensors(self, findings: Findings) -> None:
        """Tensors against those of their role in other blocks."""
        devs = self._deviations()
        every = sorted(abs(d) for of in devs.values() for d in of.values())
        if len(every) < FEWEST_TENSORS:
            return
        apart = self._in_deviations(devs, 1.4826 * every[len(every) // 2])
        role = max(apart, key=lambda each: max(apart[each])[0])
        others = [pair[0] for each, pairs in apart.items() if each != role for pair in pairs]
        if len(others) < FEWEST_TENSORS:
            return
        farthest = max(others)
        distance, name = max(apart[role])
        shift = devs[role][name] * (2 if len(devs[role]) == 2 else 1)
        if farthest <= CALM and distance > max(STRAY_TENSOR, BEYOND_TENSORS * farthest) and abs(shift) > LEAST_DISTANCE:
            what = f"is {2.0**shift:.2g} times as large as in other blocks, which is {distance:.0f} deviations"
            findings.fault(CHECK, name, f"{what}; no other tensor strays by more than {farthest:.1f}")

    def _in_deviations(
        self, devs: Mapping[str, Mapping[str, float]], deviation: float
    ) -> dict[str, list[tuple[float, str]]]:
        """By role: how far each tensor strays, in deviations of all tensors and of its own sampling, and its name."""
        wide = max(deviation, LEAST_DEVIATION)
        return {
            role: [(abs(d) / (wide**2 + self.tensors[name][1] ** 2 / 2) ** 0.5, name) for name, d in of.items()]
            for role, of in devs.items()
        }

    def _deviations(self) -> dict[str, dict[str, float]]:
        """By role and name: log2 of the size beside the median (of two: the mean) of the role."""
        roles: dict[str, dict[str, float]] = {}
        for name, (size, _) in self.tensors.items():
            roles.setdefault(re.sub(r"\d+", "#", name), {})[name] = size
        found = {}
        for role, sizes in roles.items():
            ordered = sorted(sizes.values())
            middle = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
            if len(ordered) > 1:
                found[role] = {name: size - middle for name, size in sizes.items()}
        return found

    def _judge_tables(self, quantized: Collection[str], findings: Findings) -> None:
        """Embedding and head beside the usual linear."""
        linears = sorted(self.tensors[name][0] for name in quantized if name in self.tensors)
        for name in self._rows:
            if name in quantized or len(linears) < 2:
                continue
            factor = 2.0 ** (self.tensors[name][0] - linears[len(linears) // 2])
            if factor > LARGEST_TABLE:
                findings.fault(CHECK, name, f"is {factor:.0f} times as large as the usual linear")


def _strays(sizes: torch.Tensor, constant: torch.Tensor | None) -> tuple[int, int, float, float]:
    """Of rows: the farthest, how many stray, its distance in robust deviations, and the farthest of all others."""
    import torch

    usable = sizes > 0 if constant is None else (sizes > 0) & ~constant
    logs = torch.where(usable, sizes.clamp(min=1e-38).log2(), torch.nan)
    middle = logs.nanmedian()
    apart = (logs - middle).abs()
    deviation = max((1.4826 * apart.nanmedian()).item(), LEAST_DEVIATION)
    apart = apart.nan_to_num(0.0) / deviation
    far = apart > apart.max() / BEYOND_OTHERS
    if float(apart.max()) * deviation > LEAST_DISTANCE and float(far.float().mean()) < MOST_STRAYS:
        return int(apart.argmax()), int(far.sum()), apart.max().item(), apart[~far].max().item()
    return int(apart.argmax()), 0, apart.max().item(), apart.max().item()
