"""`Move`: what a transform does to one linear input, x' = (x - shift) / scale, per channel; and what it leaves behind.

A trace is what a report keeps of a move, as plain values: enough to repeat it on the source.

    kind      of the producer: "norm", "offset-norm", "linear"; "order" where channels only changed places
    producers [[weight, bias or None, stored [in, out]]]; index: producer row of each input channel, in runs
    sites     the consumers, likewise
    shift     whether the input was shifted, too
    columns, width: of an order, the channels that went last in every run of `width`

Scales are not kept: a norm's is the quotient of its gains, and a linear's can be told from rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.model import InputGroup, LinearSite

if TYPE_CHECKING:
    import torch

# Largest relative change in float32 by a step that must change nothing: of a block's or model's output by a fold or a
# rotation, of a weight by a move. Right ones cause 1e-6 in tests, wrong ones 0.1.
UNCHANGED = 1e-4


@dataclass(frozen=True)
class Move:
    """The input of a group of linears becomes (x - shift) / scale; the linears become W * scale and b + W shift.

    scale: [in] > 0. shift: [in], or None where nothing can carry one.
    """

    scale: torch.Tensor
    shift: torch.Tensor | None = None

    @classmethod
    def of(cls, result: torch.Tensor | Move) -> Move:
        """What a transform returns: a scale [in] alone, or a move."""
        return result if isinstance(result, Move) else cls(result)

    def then(self, later: Move) -> Move:
        """This move and `later`, which was chosen for what this one leaves, as one."""
        shift = self.shift
        if later.shift is not None:
            moved = later.shift * self.scale
            shift = moved if shift is None else shift + moved
        return Move(self.scale * later.scale, shift)


def trace_of_fold(group: InputGroup, *, shift: bool) -> dict[str, Any]:
    """The trace of a scale, and a shift, that `group.fold` absorbed."""
    fold = group.admitted
    producers = [[fold.weight, fold.bias, fold.transposed]]
    return {"kind": fold.kind, "producers": producers, **_consumers(group), "shift": shift}


def trace_of_order(
    group: InputGroup, producers: Iterable[LinearSite], columns: Iterable[int], width: int
) -> dict[str, Any]:
    """The trace of rows and columns that changed places."""
    named = [[site.weight, site.bias, site.transposed] for site in producers]
    return {"kind": "order", "producers": named, **_consumers(group), "columns": list(columns), "width": width}


def _consumers(group: InputGroup) -> dict[str, Any]:
    sites = [[site.weight, site.bias, site.transposed] for site in group.sites]
    return {"sites": sites, "index": runs(group.admitted.index)}


def runs(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers as runs [first, behind the last] of neighbours."""
    pairs: list[list[int]] = []
    for number in numbers:
        if pairs and pairs[-1][1] == number:
            pairs[-1][1] += 1
        else:
            pairs.append([number, number + 1])
    return pairs


def numbers_of(pairs: Iterable[Sequence[int]]) -> list[int]:
    """The numbers of `runs`."""
    return [number for first, behind in pairs for number in range(first, behind)]
