"""Sums of x x^T: only the upper half is computed, tile by tile; the lower half is mirrored once at the end."""

from __future__ import annotations

import torch

# Below this width one product is faster than its tiles (measured on 2 CPU cores with AMX: 1.4 times at 1536 columns).
TILE = 512


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to the upper tiles of `total` [K, K], in place. rows: [N, K] float32."""
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
