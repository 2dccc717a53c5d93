"""Which statistics the linears of an expert are transformed and quantized with, and what becomes of those with few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from outlierq.core.errors import StatsError
from outlierq.core.model import InputGroup, LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.recipe import Calibration

STARVED = "its expert"
# Tokens below which statistics of an expert are not trusted: a hessian needs many, a scale per channel fewer.
LEAST_FOR_HESSIAN, LEAST_FOR_SCALES = 256, 64


@dataclass(frozen=True)
class Share:
    """Sites of a group that are quantized with the same statistics. starved: how many tokens were too few, or None.

    name: of the group, or of the expert in it, whose statistics they are. rounded: their hessian says nothing, so they
    are rounded to the grid with the least weight error. unknown: why nothing is known of an input outside of experts.
    """

    name: str
    sites: tuple[LinearSite, ...]
    stats: InputStats | None
    starved: int | None = None
    rounded: bool = False
    unknown: str = ""

    def note(self, least: int) -> str:
        """What was done about too few tokens, for the site's row; empty when they sufficed."""
        if self.starved is None:
            return ""
        instead = "rounded to nearest without statistics" if self.rounded else "with the statistics of all tokens"
        if self.sites[0].expert is None:
            return f"{self.unknown}: {instead}"
        return f"{STARVED} got {self.starved} of the {least} tokens it needs: {instead}"


def least_tokens(calibration: Calibration | None, needs: frozenset[str]) -> int:
    """How many tokens an expert must have got. needs: what the method reads."""
    if calibration is not None and calibration.min_expert_tokens is not None:
        return calibration.min_expert_tokens
    return LEAST_FOR_HESSIAN if "hessian" in needs else LEAST_FOR_SCALES


def tokens_of(group: InputGroup, stats: Mapping[str, InputStats]) -> int:
    """How many tokens the group's sites saw."""
    return stats[group.name].tokens if group.name in stats else 0


def shares(group: InputGroup, stats: Mapping[str, InputStats], least: int) -> list[Share]:
    """The sites of a group with the statistics for each.

    Gate and up of a starved expert take those of all tokens: it reads the same tensor as the others. For the input of
    its down nothing alike is known.
    """
    common = stats.get(group.name)
    if group.routed:
        tokens = tokens_of(group, stats)
        enough = tokens >= max(least, 1)
        starved = None if enough else tokens
        return [Share(group.name, group.sites, common, starved, rounded=not enough, unknown=group.fold_note)]
    apart = {site for part in group.parts for site in part.sites}
    rest = tuple(site for site in group.sites if site not in apart)
    done = [Share(group.name, rest, common)] if rest else []
    for part in group.parts:
        tokens = tokens_of(part, stats)
        enough = tokens >= max(least, 1)
        done.append(
            Share(part.name, part.sites, stats[part.name])
            if enough
            else Share(group.name, part.sites, common, starved=tokens)
        )
    return done


def in_order_of_shares(group: InputGroup) -> list[LinearSite]:
    """The sites of a group in the order of its `shares`."""
    apart = {site for part in group.parts for site in part.sites}
    return [site for site in group.sites if site not in apart] + [site for part in group.parts for site in part.sites]


def starved_note(groups: Sequence[InputGroup], stats: Mapping[str, InputStats], least: int) -> list[str]:
    """One sentence for a block about its experts with too few tokens; none when there is no such expert."""
    routed = [each for group in groups for each in (group, *group.parts) if each.routed]
    counts = {expert: tokens_of(each, stats) for each in routed if (expert := each.sites[0].expert) is not None}
    starved = {expert: tokens for expert, tokens in counts.items() if tokens < max(least, 1)}
    if not starved:
        return []
    each = ", ".join(f"{expert.rpartition('.')[2]} ({tokens:,})" for expert, tokens in starved.items())
    return [
        f"{next(iter(starved)).rpartition('.')[0]}: {len(starved)} of {len(counts)} experts got fewer than {least} "
        f"tokens: {each}. What reads the common input is quantized with the statistics of all tokens, what reads the "
        "inner one is rounded to nearest"
    ]


def check_static(share: Share, schemes: Mapping[LinearSite, QuantScheme]) -> None:
    """StatsError when the static scale of an input must be fixed that was never seen."""
    for site in share.sites:
        inputs = schemes[site].activations if site in schemes else None
        if share.stats is None and inputs is not None and not inputs.dynamic:
            raise StatsError(
                f"{site.expert or site.module} got no tokens, so nothing is known of the input of {site.module}",
                hint="calibrate on more text, or set calibration.all_experts: true"
                if site.expert
                else "set calibration.images, or use a recipe whose inputs are rounded at run time",
            )
