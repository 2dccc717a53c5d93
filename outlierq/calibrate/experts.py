"""Experts of a mixture while a block is studied: which tokens they see, and which sites of a group are theirs.

`load/model/experts/fused.py` made them separate modules; `pipeline/block/expert_stats.py` scores them for pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from outlierq.core.model import InputGroup, LinearSite

if TYPE_CHECKING:
    import torch

    from outlierq.core.stats import InputStats


@contextmanager
def routing(module: torch.nn.Module, way: Literal["chosen", "all", "probe"]) -> Iterator[None]:
    """Inside, the experts of the module see "chosen" tokens only, "all" of them, or all with a say ("probe").

    With "probe" every expert shows in the output of the block, and so does the router. Experts are what has an
    attribute `routing`.
    """
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "routing")]
    before = [part.routing for part in parts]
    try:
        for part in parts:
            part.routing = way
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.routing = value


def with_parts(group: InputGroup) -> InputGroup:
    """The group with its experts' sites named as parts, or marked as routed when it is all of one expert.

    group: found when every expert saw all tokens, so that experts, routers and shared experts read the same input. Its
    first site becomes one that always sees all tokens.
    """
    experts: dict[str, list[LinearSite]] = {}
    for site in group.sites:
        if site.expert is not None:
            experts.setdefault(site.expert, []).append(site)
    everyone = [site for site in group.sites if site.expert is None]
    if not experts:
        return group
    if not everyone:
        return replace(group, routed=True)
    parts = tuple(InputGroup(sites[0].module, tuple(sites), routed=True) for sites in experts.values())
    sites = (*everyone, *(site for site in group.sites if site.expert is not None))
    return replace(group, name=sites[0].module, sites=sites, parts=parts)


def seeing_all(groups: list[InputGroup]) -> list[InputGroup]:
    """The groups when every expert sees all tokens: there are no parts, and nothing is routed."""
    return [replace(group, parts=(), routed=False) for group in groups]


def all_groups(groups: list[InputGroup]) -> list[InputGroup]:
    """The groups and their parts."""
    return [each for group in groups for each in (group, *group.parts)]


def tokens_note(groups: list[InputGroup], stats: Mapping[str, InputStats]) -> list[str]:
    """How many tokens the experts of a block got, as a sentence; none for a block without experts."""
    routed = {
        expert: stats[group.name].tokens if group.name in stats else 0
        for group in all_groups(groups)
        if group.routed and (expert := group.sites[0].expert) is not None
    }
    if not routed:
        return []
    fewest, most = min(routed, key=routed.__getitem__), max(routed, key=routed.__getitem__)
    ordered = sorted(routed.values())
    return [
        f"{fewest.rpartition('.')[0]}: {len(routed)} experts got {routed[fewest]:,} (expert {_number(fewest)}) to "
        f"{routed[most]:,} tokens (expert {_number(most)}), half of them {ordered[len(ordered) // 2]:,} or more"
    ]


def _number(expert: str) -> str:
    """The last part of an expert's name."""
    return expert.rpartition(".")[2]
