"""REAP: drop the experts that add least to the output. Lasby et al. 2025, arXiv:2510.13999.

An expert's saliency is the mean, over the tokens that the router sends to it, of what it adds to the output:

    S_j = (1 / N_j) sum over those tokens of g_j(x) ||f_j(x)||

with g_j the router's weight and f_j the expert. The least salient ones go, and their rows of the router with them; the
result is the same architecture with fewer experts, so every runtime loads it. It is a smaller model, not the same one:
how much it loses depends on the model, and has to be measured.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Lt

from outlierq.core.measured.block_stats import BlockStats
from outlierq.registry import pruner


@pruner("reap", needs=("expert_tokens", "expert_saliency"), paper="arXiv:2510.13999")
def reap(
    stats: BlockStats, groups: int, *, prune: Annotated[float, Ge(0), Lt(1)] = 0.25, stats_folder: str = ""
) -> torch.Tensor:
    """Numbers of the experts to keep, [kept] in rising order.

    stats: of one block, with expert_tokens and expert_saliency [experts]. groups: the router chooses among this many
    groups of consecutive experts first (1 for most models); equally many experts of each are kept. prune: share of the
    experts to drop, rounded down to a number that leaves groups equal. stats_folder: of an earlier `outlierq
    calibrate` of this model, where `stats` comes from; left out, the run makes them itself. Of equal ones the later
    expert goes.
    """
    saliency = stats.need("expert_saliency") / stats.need("expert_tokens").clamp_min(1)
    by_group = saliency.view(groups, -1)
    size = by_group.shape[1]
    remaining = size - int(prune * size)
    best = by_group.argsort(dim=1, descending=True, stable=True)[:, :remaining].sort(dim=1).values
    return (best + torch.arange(groups)[:, None] * size).flatten()
