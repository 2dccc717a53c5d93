"""One scheme for all experts of a block: programs that run experts merge them, and load no others.

And one for all linears of a model, where it is loaded only so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

from outlierq.pipeline.planning.plan import SitePlan
from outlierq.recipe import GroupPolicy

SMALLER_GROUPS = (128, 64, 32)


def alike_experts(sites: list[SitePlan], policy: GroupPolicy) -> list[SitePlan]:
    """The plan with one group size for all experts of a block where the policy on odd widths gave them several."""
    sites, blocks = list(sites), dict[str, list[int]]()
    for place, planned in enumerate(sites):
        if planned.site.expert is not None and planned.scheme is not None:
            blocks.setdefault(planned.site.expert.rpartition(".")[0], []).append(place)
    for places in blocks.values():
        members = [sites[place] for place in places]
        schemes = {planned.scheme for planned in members if planned.scheme is not None}
        odd = next((planned.reason for planned in members if planned.reason), "")
        if odd and len(schemes) > 1 and len({replace(scheme, group_size=None) for scheme in schemes}) == 1:
            size = _common_group(members, policy)
            how = "per channel" if size is None else f"group {size}"
            reason = f"{how} for all experts of a block: {odd.partition(': ')[2]}"
            for place, planned in zip(places, members, strict=True):
                sites[place] = replace(
                    planned, scheme=planned.scheme and replace(planned.scheme, group_size=size), reason=reason
                )
    return sites


def alike_linears(sites: Sequence[SitePlan], policy: GroupPolicy, because: str) -> tuple[SitePlan, ...]:
    """The plan with the same group size for all quantized linears; empty where that is not all in which they differ,
    or no size divides all widths. because: why, behind the width that asks for it.
    """
    members = [planned for planned in sites if planned.scheme is not None]
    others = {planned.scheme and replace(planned.scheme, group_size=None) for planned in members}
    size = _common_group(members, policy) if len(others) == 1 else None
    if size is None:
        return ()
    odd = next(planned.reason.partition(": ")[2] for planned in members if planned.reason)
    reason = f"group {size} for all linears: {odd}, {because}"
    return tuple(
        planned
        if planned.scheme is None
        else replace(planned, scheme=replace(planned.scheme, group_size=size), reason=reason)
        for planned in sites
    )


def _common_group(members: Sequence[SitePlan], policy: GroupPolicy) -> int | None:
    """The largest group size, no larger than any of theirs, that divides all of their widths; None when none does."""
    sizes = [planned.scheme.group_size for planned in members if planned.scheme is not None]
    largest = min((size for size in sizes if size is not None), default=0)
    if policy != "smaller-group" or None in sizes:
        return None
    widths = gcd(*(planned.site.in_features for planned in members))
    return next((size for size in SMALLER_GROUPS if size <= largest and widths % size == 0), None)
