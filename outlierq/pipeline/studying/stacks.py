"""The linears of a block that are approximated together: they share an input and a scheme."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from outlierq.core.model import LinearSite, TensorSource, as_matrix
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.pipeline.block.starved import shares
from outlierq.pipeline.detect import BlockData

if TYPE_CHECKING:
    import torch

SINK_WEIGHT = 4.0  # as calibration counts first tokens by default


def stacks(
    block: BlockData, schemes: Mapping[LinearSite, QuantScheme]
) -> Iterator[tuple[list[LinearSite], str, InputStats]]:
    """Sites with the name and the statistics [K, K] of their input, first tokens weighed; others are left out."""
    for group in block.groups:
        for share in shares(group, block.inputs, 1):
            members = [site for site in share.sites if site in schemes]
            if share.stats is None or not share.stats.tokens:
                continue
            for scheme in dict.fromkeys(schemes[site] for site in members):
                same = [site for site in members if schemes[site] == scheme]
                yield same, share.name, share.stats.weighing_sinks(SINK_WEIGHT)


def stacked(members: Sequence[LinearSite], source: TensorSource) -> torch.Tensor:
    """The rows of linears with one input, float32 [out, in]."""
    import torch

    return torch.cat([as_matrix(site, source.read(site.weight)).float() for site in members])


def row_bounds(members: Sequence[LinearSite]) -> list[tuple[int, int]]:
    """First row and the one after the last of every member of a stack."""
    return list(itertools.pairwise([0, *itertools.accumulate(site.out_features for site in members)]))
