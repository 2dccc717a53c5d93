"""LLM.int8()'s outlier features. Dettmers et al. 2022, arXiv:2208.07339, section 4.

A feature (channel of the residual stream) is an outlier when |x| >= 6 occurs in it in at least 25 % of the layers and
at 6 % of the sequence positions. The paper counts the inputs of query, key, value, output and the first feed-forward
linear, not of the second. It leaves open how positions are averaged; here over the inputs that show the feature at
all. The number 6 was tuned on models whose stream has unit scale: the scale-free figure is `channel_ratio`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outlierq.core.stats import InputStats

LAYERS = 0.25
POSITIONS = 0.06


def outlier_features(
    inputs: Sequence[InputStats], *, layers: float = LAYERS, positions: float = POSITIONS
) -> dict[int, tuple[float, float]]:
    """Channel -> (share of inputs with |x| >= 6 in it, share of positions there), for the outlier features.

    inputs: statistics of equal width, one for every input that counts, with count_large and sequence_large [K].
    """
    if not inputs:
        return {}
    hit = torch.stack([stats.need("count_large") > 0 for stats in inputs])
    where = torch.stack([stats.need("sequence_large") / max(1, stats.sequences) for stats in inputs])
    layer_share = hit.double().mean(0)
    position_share = (where * hit).sum(0) / hit.sum(0).clamp(min=1)
    outlier = (layer_share >= layers) & (position_share >= positions)
    return {c: (layer_share[c].item(), position_share[c].item()) for c in outlier.nonzero().flatten().tolist()}


def large_share(stats: InputStats) -> float:
    """Share, 0..1, of all values of one input with |x| >= 6, from count_large [K]."""
    return stats.need("count_large").sum().item() / (stats.tokens * stats.channels)
