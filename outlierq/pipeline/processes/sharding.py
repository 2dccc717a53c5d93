"""Calibration text in shards, and their statistics put together in an order that no number of ranks changes.

The windows are cut into `shards` runs of neighbours. Every shard has statistics of its own, and neighbours are merged
pair by pair, and the pairs again, as in a knock-out: floating-point sums depend on their order, and this order depends
on the number of shards alone. A rank holds a run of neighbouring shards, merges what it can, and sends the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outlierq.core.model import InputGroup, LinearSite
from outlierq.core.stats import InputStats
from outlierq.pipeline.processes.ranks import Ranks

if TYPE_CHECKING:
    import torch

# (round, number): the number-th meeting of a round; round 0 are the shards themselves.
Node = tuple[int, int]
Statistics = dict[str, InputStats]


@dataclass(frozen=True)
class ShardIds:
    """The windows of one shard. first: the number of its first window. ids: [windows, tokens]."""

    index: int
    first: int
    ids: torch.Tensor


def shards_of(ids: torch.Tensor, shards: int, ranks: Ranks) -> list[ShardIds]:
    """The shards of this rank: neighbours, as many as any other rank has, give or take one; the lead has the first.

    ids: [windows, tokens].
    """
    bounds = [index * len(ids) // shards for index in range(shards + 1)]
    mine = [index for index in range(shards) if index * ranks.size // shards == ranks.rank]
    return [ShardIds(index, bounds[index], ids[bounds[index] : bounds[index + 1]]) for index in mine]


class Merging:
    """Statistics of some shards by group name, merged as far as their neighbours are there."""

    def __init__(self, shards: int):
        self.shards = shards
        self.nodes: dict[Node, Statistics] = {}

    def add(self, node: Node, stats: Statistics) -> None:
        """Put in what is known of a shard, or of several that were merged already."""
        while True:
            level, number = node
            if number % 2 == 0 and (number + 1) << level >= self.shards:  # nobody to meet in this round
                if number == 0:
                    break
            else:
                neighbour = self.nodes.pop((level, number ^ 1), None)
                if neighbour is None:
                    break
                stats = _merged(neighbour, stats) if number % 2 else _merged(stats, neighbour)
            node = level + 1, number // 2
        self.nodes[node] = stats

    def take(self, name: str) -> dict[Node, Statistics]:
        """The statistics of a group; they are held no longer."""
        return {node: {name: held.pop(name)} if name in held else {} for node, held in self.nodes.items()}


def combined(ranks: Ranks, merging: Merging, name: str, owner: int) -> Statistics:
    """The statistics of a group over all shards, on the rank that owns it; others give theirs, and get none."""
    nodes = merging.take(name)
    if ranks.rank != owner:
        ranks.send(nodes, owner)
        return {}
    whole = Merging(merging.shards)
    for rank in range(ranks.size):
        for node, stats in (nodes if rank == owner else ranks.receive(rank)).items():
            whole.add(node, stats)
    (root,) = whole.nodes.values()
    return root


def _merged(one: Statistics, other: Statistics) -> Statistics:
    """Statistics of two neighbours, emptying both; a group that only one of them saw (an expert) keeps what it has."""
    done: Statistics = {}
    for name in dict.fromkeys((*one, *other)):
        mine, theirs = one.pop(name, None), other.pop(name, None)
        if mine and theirs:
            # An input without sequences may look as if it had some in one shard and not in the other.
            odd: dict[str, Any] = dict.fromkeys(mine.tensors().keys() ^ theirs.tensors().keys())
            done[name] = replace(mine, **odd).merge(replace(theirs, **odd))
        elif mine:
            done[name] = mine
        elif theirs:
            done[name] = theirs
    return done


def bare(stats: InputStats) -> InputStats:
    """How many tokens there were, without their statistics: what ranks know of groups that others own."""
    return InputStats(stats.tokens, stats.sequences)


def dealt(groups: Sequence[InputGroup], ranks: Ranks) -> dict[str, int]:
    """The rank that works on each group, by name: the dearest first, each to who has least to do.

    The experts of a group, which have statistics of their own, are dealt apart from it.
    """
    costs: dict[str, int] = {}
    for group in groups:
        apart = {site for part in group.parts for site in part.sites}
        costs[group.name] = cost([site for site in group.sites if site not in apart])
        costs |= {part.name: cost(part.sites) for part in group.parts}
    load = [0] * ranks.size
    owners: dict[str, int] = {}
    for name in sorted(costs, key=costs.__getitem__, reverse=True):  # stable: equal ones in the order of the block
        rank = load.index(min(load))
        owners[name] = rank
        load[rank] += costs[name]
    return owners


def cost(sites: Sequence[LinearSite]) -> int:
    """What solving sites of one input takes, for comparison: products with the hessian, searches, a factorisation.

    Fitted to the four groups of SmolLM2-135M with gptq-w4, which it gives within 15 %.
    """
    width, rows = max((site.in_features for site in sites), default=0), sum(site.out_features for site in sites)
    return rows * width * (width + 300) + width**3 // 8


def all_of_lead(groups: Sequence[InputGroup], ranks: Ranks) -> dict[str, int]:
    """Every group is the lead's."""
    return {name: 0 for group in groups for name in names_of(group)}


def names_of(group: InputGroup) -> list[str]:
    """The names under which statistics of a group are kept: its own, and those of its experts."""
    return [group.name, *(part.name for part in group.parts)]


def sorted_by_group(groups: Sequence[InputGroup], stats: Mapping[str, InputStats]) -> Statistics:
    """The statistics in the order of the groups."""
    return {name: stats[name] for group in groups for name in names_of(group) if name in stats}
