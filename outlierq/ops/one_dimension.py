"""Exact k-means of numbers on a line, by dynamic programming (Wang and Song 2011, doi:10.32614/RJ-2011-015)."""

from __future__ import annotations

import torch

BINS = 1024


def k_means(values: torch.Tensor, clusters: int, *, bins: int = BINS) -> torch.Tensor:
    """Ascending bounds [clusters - 1] float64 between the clusters with the least squared distance from their means.

    values: [n]. Exact for the values rounded to the middles of `bins` even bins. Fewer bounds where there are fewer
    different values than clusters.
    """
    low, high = values.min().item(), values.max().item()
    if low == high:
        return torch.empty(0, dtype=torch.float64)
    counts = torch.histc(values.float(), bins, low, high).double()
    middles = low + (torch.arange(bins, dtype=torch.float64) + 0.5) * (high - low) / bins
    middles, counts = middles[counts > 0], counts[counts > 0]
    starts = _best_starts(middles, counts, min(clusters, len(middles)))
    return (middles[starts] + middles[starts - 1]) / 2


def _best_starts(middles: torch.Tensor, counts: torch.Tensor, clusters: int) -> torch.Tensor:
    """The first bin of every cluster but the lowest, ascending. middles, counts: [n], float64."""
    sums = [torch.cat([counts.new_zeros(1), (counts * middles**power).cumsum(0)]) for power in range(3)]
    first, last = torch.arange(len(middles))[:, None], torch.arange(len(middles))[None]
    count, total, square = (each[last + 1] - each[first] for each in sums)
    within = torch.where(first <= last, square - total**2 / count.clamp(min=1), torch.inf)  # [first bin, last bin]
    least, choices = within[0], []
    for _ in range(clusters - 1):
        before = torch.cat([least.new_full((1,), torch.inf), least[:-1]])  # a cluster from bin i has these before it
        least, start = (before[:, None] + within).min(0)
        choices.append(start)
    end, starts = len(middles) - 1, []
    for start in reversed(choices):
        starts.append(int(start[end]))
        end = starts[-1] - 1
    return torch.tensor(starts[::-1], dtype=torch.long)
