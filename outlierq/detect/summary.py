"""The findings of a whole model in sentences, the most important first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from outlierq.core.measured.outliers import BlockOutliers, GroupOutliers, MassiveEntry
from outlierq.detect.inputs.channel_ratio import STANDS_OUT
from outlierq.detect.verdict import ADVICE, LADDER, LAST_RESORT

MOST_NAMES = 12
LOUD = 2.0  # times the median error of 4-bit floats, which is nearly the same for all inputs without outliers


def summarise(
    groups: Sequence[GroupOutliers],
    blocks: Sequence[BlockOutliers],
    features: Mapping[str, tuple[float, float]],
    channels: Sequence[int],
    super_weight: str | None = None,
) -> tuple[str, ...]:
    """Sentences for the head of every report. super_weight: what wrote the first massive activation, in words."""
    sentences = [
        _dangers(groups),
        *_dangerous_roles(groups),
        _channels(channels, features),
        _massive(blocks, super_weight),
        _sinks(blocks),
        _remedies(groups),
        _worst(groups, "w4a16", "W4A16 (round to nearest)"),
        *(_block_floats(groups, scheme) for scheme in ("nvfp4", "mxfp4")),
    ]
    return tuple(sentence for sentence in sentences if sentence)


def _dangers(groups: Sequence[GroupOutliers]) -> str:
    """How many of which."""
    count = Counter(group.danger for group in groups)
    if not count["dangerous"] and not count["watch"]:
        return f"All {len(groups)} inputs are calm."
    return f"{count['dangerous']} of {len(groups)} inputs are dangerous, {count['watch']} deserve a look."


def _dangerous_roles(groups: Sequence[GroupOutliers]) -> list[str]:
    """A sentence for every kind of site that is dangerous somewhere: blocks, and why at its worst."""
    by_role: dict[str, list[GroupOutliers]] = {}
    for group in groups:
        if group.danger == "dangerous":
            by_role.setdefault(group.role, []).append(group)
    sentences = []
    for role, some in by_role.items():
        worst = max(some, key=lambda group: group.errors.get("w8a8", 0.0))
        why = "; ".join(worst.reasons[:3])
        where = "block" if len(some) == 1 else "blocks"
        sentences.append(
            f"Dangerous: {role} in {where} {numbers(group.block for group in some)}. "
            f"{'' if len(some) == 1 else f'At worst (block {worst.block}): '}{why}."
        )
    return sentences


def _channels(channels: Sequence[int], features: Mapping[str, tuple[float, float]]) -> str:
    """Outlier channels of the residual stream, and LLM.int8()'s outlier features."""
    if channels:
        some = "Channel" if len(channels) == 1 else "Channels"
        verb = "stands" if len(channels) == 1 else "stand"
        text = f"{some} {names(map(str, channels))} of the residual stream {verb} out in most blocks"
        text += f" (at least {STANDS_OUT:g} times the median channel)."
    else:
        text = f"No channel of the residual stream is {STANDS_OUT:g} times the median one in most blocks."
    if not features:
        return f"{text} No outlier feature by the LLM.int8() criterion."
    noun = "outlier feature" if len(features) == 1 else "outlier features"
    return f"{text} {len(features)} {noun} by the LLM.int8() criterion: {names(features)}."


def _massive(blocks: Sequence[BlockOutliers], super_weight: str | None) -> str:
    """Massive activations: where they begin, how large they get."""
    entries = [entry for block in blocks for entry in block.massive]
    if not entries:
        measured = any("residual_abs_max" in block.measures for block in blocks)
        return "No massive activations in the residual stream." if measured else ""
    first, largest = min(entries, key=lambda e: e.block), max(entries, key=lambda e: abs(e.value))
    where = numbers(sorted({entry.block for entry in entries}))
    channels = numbers(sorted({entry.channel for entry in entries}))
    origin = f" Written by {super_weight}." if super_weight else ""
    return (
        f"Massive activations after blocks {where}, in channels {channels}: up to {largest.value:.0f} "
        f"({largest.ratio:.0f} times the median) at {_place(largest)}. They appear after block {first.block}.{origin}"
    )


def _place(entry: MassiveEntry) -> str:
    """Which token."""
    token = f"the token {entry.text!r}" if entry.text else f"token {entry.token}"
    return f"{token}, position {entry.position}"


def _sinks(blocks: Sequence[BlockOutliers]) -> str:
    """How many heads attend to the first token."""
    shares = [block.measures["sink_heads"] for block in blocks if "sink_heads" in block.measures]
    if not shares:
        return ""
    idle = [block.measures["no_op_heads"] for block in blocks if "no_op_heads" in block.measures]
    text = f"{sum(shares) / len(shares):.0%} of the attention heads use the first token as a sink"
    return f"{text}, {sum(idle) / len(idle):.0%} do nothing else." if idle else f"{text}."


def _remedies(groups: Sequence[GroupOutliers]) -> str:
    """W8A8: the worst error and what it takes."""
    worst = _worst(groups, "w8a8", "W8A8 (int8, per token)")
    count = Counter(group.remedy for group in groups if group.remedy)
    if not worst or not count:
        return worst
    parts = [f"{ADVICE[name]} for {count[name]}" for name in (*LADDER, LAST_RESORT) if count[name]]
    return f"{worst} What helps, by number of inputs: {', '.join(parts)}."


def _worst(groups: Sequence[GroupOutliers], scheme: str, name: str) -> str:
    """Median and worst predicted error of a scheme."""
    errors = sorted((group.errors[scheme], group.group) for group in groups if scheme in group.errors)
    if not errors:
        return ""
    middle, (highest, where) = errors[len(errors) // 2][0], errors[-1]
    return f"{name}: predicted output error {middle:.2%} at the median input, {highest:.2%} at the worst ({where})."


def _block_floats(groups: Sequence[GroupOutliers], scheme: str) -> str:
    """Both operands in 4-bit floats: errors, and the inputs that stand out, for which 8 bits are the remedy."""
    worst = _worst(groups, scheme, f"{scheme.upper()} W4A4 (round to nearest)")
    errors = sorted(((group.errors[scheme], group.group) for group in groups if scheme in group.errors), reverse=True)
    loud = [name for error, name in errors if error > LOUD * errors[len(errors) // 2][0]]
    if not loud:
        return worst
    many = "loses" if len(loud) == 1 else "lose"
    return f"{worst} {names(loud)} {many} more than {LOUD:g} times the median: `auto-{scheme}` keeps such in FP8."


def names(items: Iterable[str]) -> str:
    """A list that stays short."""
    listed = list(items)
    more = f" and {len(listed) - MOST_NAMES} more" if len(listed) > MOST_NAMES else ""
    return ", ".join(listed[:MOST_NAMES]) + more


def numbers(items: Iterable[int]) -> str:
    """Ascending numbers with runs joined: 0, 3-5, 9."""
    runs: list[list[int]] = []
    for number in items:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return names(str(first) if first == last else f"{first}-{last}" for first, last in runs)
