"""Codebooks of GGUF: tables of values that are not evenly spaced, and of vectors that stand for 4 or 8 weights at once.

They are those of llama.cpp, read from the package `gguf`. A vector holds magnitudes; signs are stored apart, of some
types for 7 of 8 weights, so that the number of negative ones is even.
"""

from __future__ import annotations

from functools import cache

import torch

from outlierq.core.gguf.types import BlockType
from outlierq.core.machine.installed import needs_extra
from outlierq.core.scheme import SIGNS
from outlierq.ops.compiled import vectors as native_vectors

# Vectors of weights that are held against a codebook at a time: their distances stay in the cache.
VECTORS_AT_ONCE = 1 << 11


@cache
def levels(name: str) -> torch.Tensor:
    """[n] float32 values of a table, rising. name: of a type whose codes stand for one weight."""
    needs_extra("gguf")
    from gguf import GGMLQuantizationType, quants

    assert GGMLQuantizationType[name] in quants._type_traits, f"{name} has no table"
    return torch.tensor(quants.IQ4_NL.kvalues, dtype=torch.float32)


@cache
def codewords(name: str) -> torch.Tensor:
    """[n, 4 or 8] float32 magnitudes of a type's vectors, in the order of their codes."""
    needs_extra("gguf")
    from gguf import quants

    table = getattr(quants, name)
    table.init_grid()
    return torch.from_numpy(table.grid.reshape(table.grid_shape).copy()).float()


@cache
def _near_words(name: str) -> native_vectors.NearWords | None:
    """Which codewords of a type are nearest where; None: all are to be tried."""
    return native_vectors.near_words(codewords(name))


def nearest_level(ratio: torch.Tensor, name: str) -> torch.Tensor:
    """`ratio` of any shape rounded in place to the nearest value of the table; of two equally near ones the smaller."""
    values = levels(name).to(ratio.device)
    return ratio.copy_(values[torch.bucketize(ratio, (values[1:] + values[:-1]) / 2)])


def nearest_vectors(ratio: torch.Tensor, kind: BlockType, importance: torch.Tensor | None = None) -> torch.Tensor:
    """`ratio` [n, 8] rounded to codewords with signs, float32: of those that can be stored the nearest.

    importance: [period, 8] weights of the squared distance, positive, of vector i the row i modulo period; None: all
    alike. Where the signs must be even the one is turned that costs least, its magnitude then being as small as it can.
    """
    near = _near_words(kind.name) if importance is None and not kind.even_signs else None
    found = None if near is None else native_vectors.nearest_in_cells(ratio, near)
    if found is not None:
        return found
    importance = torch.ones(1, SIGNS, device=ratio.device) if importance is None else importance
    words = codewords(kind.name).to(ratio.device)
    found = native_vectors.nearest_vectors(ratio, words, importance, even_signs=kind.even_signs)
    if found is not None:
        return found
    places = torch.arange(len(ratio), device=ratio.device) % len(importance)
    parts = zip(torch.split(ratio, VECTORS_AT_ONCE), torch.split(places, VECTORS_AT_ONCE), strict=True)
    return torch.cat([_nearest(part, kind, words, importance[place]) for part, place in parts])


def _nearest(ratio: torch.Tensor, kind: BlockType, words: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`nearest_vectors` of a handful of vectors. weight: of each of their values."""
    size, sign = ratio.abs(), torch.where(ratio < 0, -1.0, 1.0)
    if kind.even_signs:
        odd = (ratio < 0).sum(1) % 2 == 1
        cheapest = (weight * size.square()).argmin(1)
        turned = torch.zeros_like(ratio, dtype=torch.bool).scatter_(1, cheapest[:, None], odd[:, None])
        size, sign = torch.where(turned, -size, size), torch.where(turned, -sign, sign)
    weight, size = weight.reshape(-1, kind.vector), size.reshape(-1, kind.vector)
    distance = torch.addmm(weight @ words.square().T, weight * size, words.T, alpha=-2)
    return words[distance.argmin(1)].view(ratio.shape) * sign
