"""Keys of even size for a KV cache of few bits: SmoothAttention of QServe, arXiv:2405.04532, section 4.2.

A server rounds the keys of a token and head with one scale, so that one loud channel takes the others' precision. Each
is divided by the root of its size, and the query's channel multiplied by it: their product is what it was. Behind
rotary embedding the two channels of a pair share a scale, which then passes the rotation; where there is none, or for
channels that are not rotated, each has its own. It costs nothing when the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge, Le

from outlierq.core.model import LinearSite
from outlierq.registry import rewriter
from outlierq.transform.channels import nearest_powers_of_two
from outlierq.transform.rotate import Change, Rewrite

if TYPE_CHECKING:
    Read = Callable[[str], torch.Tensor]

LARGEST_RATIO = 64.0  # of a channel's scale to the middle of its head


@dataclass(frozen=True)
class KeyPath:
    """Linears that write the keys and queries of a block. shared: for each row of keys the number of its scale; scales
    of a head follow each other. queries: for each row of queries the row of keys that it meets. gain: the weight of the
    norm that both read, or None; offset: it counts as 1 + weight. sizes: the largest number of each row of keys that
    calibration saw, or nothing.
    """

    block: int
    key: LinearSite
    query: LinearSite
    shared: tuple[int, ...]
    queries: tuple[int, ...]
    heads: int
    gain: str | None = None
    offset: bool = False
    sizes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Keys:
    """The paths of a model's blocks. obstacle: why some or all have none, empty where all have one."""

    keys: tuple[KeyPath, ...] = ()
    obstacle: str = ""


@dataclass(frozen=True)
class Stretch:
    """Outputs of the keys divided by the scales of a path, or of the queries multiplied."""

    path: KeyPath
    is_key: bool
    strength: float
    held: int = 0

    def __call__(self, x: torch.Tensor, read: Read) -> torch.Tensor:
        """x [..., outputs] in other units. read: gives tensors of the source."""
        scale = key_scale(self.path, self.strength, read).to(x)
        return x / scale if self.is_key else x * scale[torch.tensor(self.path.queries)]


def key_scale(path: KeyPath, strength: float, read: Read) -> torch.Tensor:
    """[rows of keys] float64 powers of two: sizes to the power of `strength`, over their middle.

    Sizes are those that calibration saw. Without, they are told from the weights, as if the input were white but for
    the gain of its norm; the bias is part of it.
    """
    number = torch.tensor(path.shared)
    energy = torch.tensor(path.sizes).double().square() if path.sizes else _energy(path, read)
    sums = torch.zeros(int(number.max()) + 1, dtype=torch.float64).scatter_reduce_(0, number, energy, "amax")
    size = sums.clamp(min=torch.finfo(torch.float32).tiny).sqrt().view(path.heads, -1)
    scale = (size / size.log().mean(1, keepdim=True).exp()) ** strength
    return nearest_powers_of_two(scale.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)).flatten()[number]


def _energy(path: KeyPath, read: Read) -> torch.Tensor:
    """[rows of keys] float64: squares of their sizes by the weights alone."""
    stored = read(path.key.weight)
    weight = (stored.T if path.key.transposed else stored).double()
    if path.gain is not None:
        weight = weight * (read(path.gain).double() + path.offset)
    energy = weight.square().sum(1)
    return energy if path.key.bias is None else energy + read(path.key.bias).double().square()


@rewriter("even_keys", paper="arXiv:2405.04532")
def even_keys(
    keys: Keys, *, strength: Annotated[float, Ge(0), Le(1)] = 0.5, stats_folder: str | None = None
) -> Rewrite:
    """Divide keys by their size, channel by channel, and multiply queries; the model computes the same.

    strength: the power of the size, as in the paper; 1 makes all keys of one size, and queries uneven. Scales are
    powers of two, which 16-bit weights take without rounding. stats_folder: of `outlierq calibrate` with this model,
    for the sizes that it saw; without it they are told from the weights, which gains less. Blocks that do not allow it
    are left as they are, with a note.
    """
    changes = {}
    for path in keys.keys:
        for site, is_key in ((path.key, True), (path.query, False)):
            stretch = Stretch(path, is_key, strength)
            for name, weight in ((site.weight, None), (site.bias, site.weight)):
                if name is not None:
                    changes[name] = Change(name, site.transposed, by_output=(stretch,), weight=weight)
    told = "by calibration" if stats_folder else "by their weights"
    notes = [f"even_keys: keys of {len(keys.keys)} blocks, {told}"] if keys.keys else []
    which = "other keys are" if keys.keys else "keys are"
    notes += [f"even_keys: {which} left as they are: {keys.obstacle}"] if keys.obstacle else []
    return Rewrite(changes, tuple(notes))
