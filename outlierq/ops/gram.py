"""Sums of x x^T: only the upper half is computed, tile by tile; the lower half is mirrored once at the end.

Inputs of bfloat16 are added by compiled code where the processor has instructions for them and no matrix unit
(ops/compiled/gram.py), at twice the speed of float32 products; sums are float32 either way, in another order.
"""

from __future__ import annotations

import torch

from outlierq.ops.compiled import gram as native

# Below this width one product is faster than its tiles (measured on 2 CPU cores with AMX: 1.4 times at 1536 columns).
TILE = 512


def no_sum(width: int) -> torch.Tensor:
    """[K, K] float32 zeros on the CPU, to add to: until it is mirrored, the half that nobody writes takes no memory."""
    import numpy as np

    return torch.from_numpy(np.zeros((width, width), np.float32))


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to the upper tiles of `total` [K, K] float32, in place. rows: [N, K]."""
    if native.add_gram(total, rows):
        return
    rows = rows.float()
    width = total.shape[0]
    tile = TILE if width >= 2 * TILE else width
    for i in range(0, width, tile):
        left = rows[:, i : i + tile].T
        for j in range(i, width, tile):
            total[i : i + tile, j : j + tile].addmm_(left, rows[:, j : j + tile])


def mirror(total: torch.Tensor) -> torch.Tensor:
    """The matrix [K, K] itself, its lower half filled in place from the upper one, which is known."""
    width = total.shape[0]
    for i in range(0, width, TILE):
        rows = slice(i, i + TILE)
        corner = total[rows, rows]
        corner.copy_(corner.triu() + corner.triu(1).T)
        for j in range(i + TILE, width, TILE):
            total[j : j + TILE, rows] = total[rows, j : j + TILE].T
    return total
