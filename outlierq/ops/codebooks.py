"""Codebooks of GGUF: tables of values that are not evenly spaced, and of vectors that stand for 4 or 8 weights at once.

They are those of llama.cpp, read from the package `gguf`. A vector holds magnitudes; signs are stored apart, of some
types for 7 of 8 weights, so that the number of negative ones is even.
"""

from __future__ import annotations

from functools import cache

import torch

from outlierq.core.gguf.types import BlockType

SIGNS = 8  # weights whose signs are stored together
# Vectors of weights that are held against a codebook at a time: their distances stay in the cache.
VECTORS_AT_ONCE = 1 << 11


@cache
def levels(name: str) -> torch.Tensor:
    """[n] float32 values of a table, rising. name: of a type whose codes stand for one weight."""
    from gguf import GGMLQuantizationType, quants

    assert GGMLQuantizationType[name] in quants._type_traits, f"{name} has no table"
    return torch.tensor(quants.IQ4_NL.kvalues, dtype=torch.float32)


@cache
def codewords(name: str) -> torch.Tensor:
    """[n, 4 or 8] float32 magnitudes of a type's vectors, in the order of their codes."""
    from gguf import quants

    table = getattr(quants, name)
    table.init_grid()
    return torch.from_numpy(table.grid.reshape(table.grid_shape).copy()).float()


def nearest_level(ratio: torch.Tensor, name: str) -> torch.Tensor:
    """`ratio` of any shape rounded in place to the nearest value of the table; of two equally near ones the smaller."""
    values = levels(name).to(ratio.device)
    return ratio.copy_(values[torch.bucketize(ratio, (values[1:] + values[:-1]) / 2)])


def nearest_vectors(ratio: torch.Tensor, kind: BlockType, importance: torch.Tensor | None = None) -> torch.Tensor:
    """`ratio` [n, 8] rounded to codewords with signs, float32: of those that can be stored the nearest.

    importance: [8] or [n, 8] weights of the squared distance, positive; None: all alike. Where the signs must be even
    the one is turned that costs least, its magnitude then being as small as possible.
    """
    return torch.cat(
        [
            _nearest(part, kind, importance if importance is None or importance.dim() == 1 else importance[first])
            for part, first in _parts(ratio)
        ]
    )


def _parts(ratio: torch.Tensor) -> list[tuple[torch.Tensor, slice]]:
    """Some rows at a time, and which."""
    slices = [slice(start, start + VECTORS_AT_ONCE) for start in range(0, len(ratio), VECTORS_AT_ONCE)]
    return [(ratio[part], part) for part in slices]


def _nearest(ratio: torch.Tensor, kind: BlockType, importance: torch.Tensor | None) -> torch.Tensor:
    """`nearest_vectors` of a handful of vectors."""
    weight = torch.ones_like(ratio) if importance is None else importance.expand_as(ratio)
    size, sign = ratio.abs(), torch.where(ratio < 0, -1.0, 1.0)
    if kind.even_signs:
        odd = (ratio < 0).sum(1) % 2 == 1
        cheapest = (weight * size.square()).argmin(1)
        turned = torch.zeros_like(ratio, dtype=torch.bool).scatter_(1, cheapest[:, None], odd[:, None])
        size, sign = torch.where(turned, -size, size), torch.where(turned, -sign, sign)
    words = codewords(kind.name).to(ratio.device)
    weight, size = weight.reshape(-1, kind.vector), size.reshape(-1, kind.vector)
    distance = torch.addmm(weight @ words.square().T, weight * size, words.T, alpha=-2)
    return words[distance.argmin(1)].view(ratio.shape) * sign
