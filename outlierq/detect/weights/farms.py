"""Heavy-tail exponent of a weight's spectrum from windows of fixed shape. FARMS, Hu et al. 2025, arXiv:2506.06280.

The eigenvalues of W W^T are squared singular values. How heavy their tail is tells how well a layer is trained (Martin
and Mahoney 2018, arXiv:1810.01075), but the estimate depends on the shape: for random matrices 2.1 when square, 3.5 at
1 : 4. So square windows are cut out, evenly spread, and their eigenvalues pooled; random matrices of every shape then
give 2.12. Hill's estimate over the upper half of the pool (x_min at the median, "xmin_mid").

The paper takes windows of up to 2000 rows and 15 x 15 of them; here 128 rows and 3 x 3, which costs milliseconds. Only
figures made with the same windows compare.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import StatsError
from outlierq.detect.weights.hill import hill_alpha

SIZE = 128
WINDOWS = 3
SMALLEST = 16  # an exponent from fewer eigenvalues a window is noise


def spectrum_alpha(weight: torch.Tensor, *, size: int = SIZE, windows: int = WINDOWS) -> float:
    """Exponent of the pooled window spectra of `weight` [out, in]; StatsError when a side is below 16."""
    edge = min(size, *weight.shape)
    if edge < SMALLEST:
        raise StatsError(f"a weight of {tuple(weight.shape)} is too small for a spectrum (at least {SMALLEST} a side)")
    rows, columns = (_starts(length, edge, windows) for length in weight.shape)
    cut = torch.stack([weight[i : i + edge, j : j + edge].float() for i in rows for j in columns])
    eigenvalues = torch.linalg.eigvalsh(cut @ cut.mT).clamp(min=0)
    return hill_alpha(eigenvalues, tail=0.5)


def _starts(length: int, edge: int, windows: int) -> list[int]:
    """First rows of evenly spread windows, each once."""
    return sorted({round(i * (length - edge) / max(1, windows - 1)) for i in range(windows)})
