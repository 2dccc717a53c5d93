"""The pictures of an outlier report as Vega-Lite specifications: plain values, drawn in a browser or as PNG.

Here values are chosen, merged and rounded; `outlier_panels` says how they look.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from outlierq.core.measured.outliers import GroupOutliers, MassiveEntry, OutlierReport
from outlierq.report.pages.outlier_panels import (
    CHANNEL_COLOURS,
    Spec,
    channel_panel,
    error_panel,
    framed,
    log_domain,
    magnitude_colour,
    massive_panel,
    sorted_panel,
)

PREFERRED_SCHEME = "w8a8"

# A heat map cell costs about 10 bytes and one drawn rectangle: with 64 Ki of them the page opens in about a second.
COLUMNS, CELLS = 384, 1 << 16
RANKS = 40  # points of a sorted curve, spread evenly over log(rank)
MOST_MASSIVE = 4000


@dataclass(frozen=True)
class Picture:
    """One picture. name: for files and anchors. how_to_read: one sentence under it. alt: what it shows, in words.

    spec: Vega-Lite, or None; `absent` then says why there is nothing to draw.
    """

    name: str
    title: str
    how_to_read: str
    alt: str
    spec: Spec | None
    absent: str = ""


def pictures(report: OutlierReport) -> tuple[Picture, ...]:
    """The four pictures of a report, in the order in which they are read."""
    return channel_map(report), sorted_maxima(report), massive_map(report), error_chart(report)


def channel_map(report: OutlierReport) -> Picture:
    """Blocks x channels, colour is the largest |x| of a channel; one panel for every role.

    Neighbouring channels share a column where there are more than `COLUMNS`; the column shows the largest of them, and
    the names of channel and group stay with it.
    """
    roles = _by_role(report.groups)
    rows = sum(len({group.block for group in groups}) for groups in roles.values())
    columns = max(1, min(COLUMNS, CELLS // max(rows, 1)))
    cells = {role: _cells(groups, columns) for role, groups in roles.items()}
    values = [v for role in cells.values() for row in role for v in row["v"] if v > 0]
    picture = Picture(
        "channels",
        "Where the outliers are",
        "Every row is a decoder block, every column a channel of the input; the brighter, the larger its largest |x|. "
        "A bright vertical line is a channel that stands out in block after block.",
        f"Heat map of the largest absolute activation of every input channel in {len(report.blocks)} blocks, "
        f"one panel for each of {len(roles)} inputs: {', '.join(roles)}.",
        None,
        "The statistics hold no channel maxima above zero.",
    )
    if not values:
        return picture
    floor, top = float(np.percentile(values, 5)), max(values)
    colour = magnitude_colour(min(floor, top / 10), top)
    blocks = _blocks(report)
    panels = [channel_panel(role, roles[role], rows, blocks, colour) for role, rows in cells.items()]
    return replace(picture, spec=framed({"vconcat": panels, "spacing": 28}))


def sorted_maxima(report: OutlierReport) -> Picture:
    """Per input: channels sorted by their largest |x|, rank against |x|, both logarithmic; colour is the danger."""
    roles = _by_role(report.groups)
    drawn = {role: _one_per_block(groups, lambda g: max(g.abs_max, default=0)) for role, groups in roles.items()}
    rows = {role: [_ranked(group) for group in groups] for role, groups in drawn.items()}
    values = [value for role in rows.values() for row in role for value in row["value"]]
    picture = Picture(
        "sorted",
        "How far they stand out",
        "Every line is one input, its channels sorted from the largest down: a line that starts high and falls at once "
        "has few outlier channels, which is what a scale shared by the whole token suffers from."
        + _reduced(roles, drawn),
        f"Line charts of sorted channel maxima for {sum(map(len, drawn.values()))} inputs, coloured by danger.",
        None,
        "The statistics hold no channel maxima above zero.",
    )
    if not values:
        return picture
    # Dead channels lie decades below the rest and would press it together.
    domain = log_domain([float(np.percentile(values, 2)), max(values)])
    widest = max(len(group.abs_max) for groups in drawn.values() for group in groups)
    panels = [sorted_panel(role, rows[role], domain, widest) for role in rows]
    return replace(picture, spec=framed({"concat": panels, "columns": 2, "spacing": 40}))


def massive_map(report: OutlierReport) -> Picture:
    """Token position x block, one circle per massive activation (arXiv:2402.17762), its area by |value|."""
    entries = _distinct(entry for block in report.blocks for entry in block.massive)
    drawn = entries[:MOST_MASSIVE]
    dropped = f" Only the largest {len(drawn)} of {len(entries)} are drawn." if len(drawn) < len(entries) else ""
    picture = Picture(
        "massive",
        "Massive activations",
        "Every circle is an activation of the residual stream that is far above the rest: how large by its area, which "
        "token by its place from left to right, which channel by its colour. They usually sit on the first token and "
        "stay where they appeared." + dropped,
        f"Map of {len(drawn)} massive activations over token positions and blocks.",
        None,
        "No massive activations were found in the residual stream.",
    )
    if not drawn:
        return picture
    return replace(picture, spec=framed(massive_panel(drawn, _blocks(report))))


def error_chart(report: OutlierReport) -> Picture:
    """Block against predicted relative output error, before and after the chosen remedy; one panel for every role."""
    scheme = main_scheme(report.groups)
    roles = _by_role(group for group in report.groups if _positive(group.errors.get(scheme)))
    drawn = {role: _one_per_block(groups, lambda g: g.errors[scheme]) for role, groups in roles.items()}
    picture = Picture(
        "errors",
        f"What they cost: predicted {scheme.upper()} error" if scheme else "What they cost",
        f"A ring is the relative output error that plain {scheme.upper()} would make at this input, a dot the error "
        "after the remedy in the table below; a ring without a dot needs none, or none was found."
        + _reduced(roles, drawn),
        f"Predicted relative output error with {scheme.upper()} for {sum(map(len, drawn.values()))} inputs, "
        "before and after the chosen remedy.",
        None,
        "The report holds no predicted errors.",
    )
    rows = {role: [_error_row(group, scheme) for group in groups] for role, groups in drawn.items()}
    values = [row[key] for role in rows.values() for row in role for key in ("before", "after") if row[key]]
    if not values:
        return picture
    domain, blocks = log_domain(values), _blocks(report)
    panels = [error_panel(role, rows[role], domain, blocks) for role in rows]
    return replace(picture, spec=framed({"concat": panels, "columns": 2, "spacing": 40}))


def main_scheme(groups: Iterable[GroupOutliers]) -> str:
    """The scheme to show first: W8A8 where it was predicted, else the first one; "" when there is none."""
    names = schemes(groups)
    return PREFERRED_SCHEME if PREFERRED_SCHEME in names else next(iter(names), "")


def schemes(groups: Iterable[GroupOutliers]) -> tuple[str, ...]:
    """The plain schemes with a predicted error, in the order of their first appearance."""
    return tuple(dict.fromkeys(key for group in groups for key in group.errors if " " not in key))


def error_after(group: GroupOutliers, scheme: str) -> float | None:
    """The predicted error with the group's remedy, or None when it has none or it was not predicted."""
    return group.errors.get(f"{scheme} {group.remedy}") if group.remedy else None


# Values


def _by_role(groups: Iterable[GroupOutliers]) -> dict[str, list[GroupOutliers]]:
    """Groups under their role, in the order of first appearance."""
    roles: dict[str, list[GroupOutliers]] = defaultdict(list)
    for group in groups:
        roles[group.role].append(group)
    return dict(roles)


def _one_per_block(groups: Sequence[GroupOutliers], size: Callable[[GroupOutliers], float]) -> list[GroupOutliers]:
    """Of several groups of one block (experts) the one with the largest `size`."""
    worst: dict[int, GroupOutliers] = {}
    for group in groups:
        if group.block not in worst or size(group) > size(worst[group.block]):
            worst[group.block] = group
    return list(worst.values())


def _reduced(roles: dict[str, list[GroupOutliers]], drawn: dict[str, list[GroupOutliers]]) -> str:
    """A sentence for the caption where not every group is drawn."""
    every, some = sum(map(len, roles.values())), sum(map(len, drawn.values()))
    return f" Of several experts in a block the worst is drawn ({some} of {every} inputs)." if some < every else ""


def _cells(groups: Sequence[GroupOutliers], columns: int) -> list[dict[str, Any]]:
    """Per block: v, the largest |x| in every column; c, the channel it is in; n, index into `names` of the group."""
    blocks: dict[int, list[GroupOutliers]] = defaultdict(list)
    for group in groups:
        blocks[group.block].append(group)
    rows = []
    for block, members in blocks.items():
        channels = max(len(group.abs_max) for group in members)
        width = max(1, math.ceil(channels / columns))
        padded = np.full((len(members), math.ceil(channels / width) * width), -1.0)
        for line, group in zip(padded, members, strict=True):
            line[: len(group.abs_max)] = np.nan_to_num(group.abs_max, nan=0.0, posinf=0.0)
        largest = padded.max(axis=0).reshape(-1, width)
        channel = largest.argmax(axis=1) + np.arange(len(largest)) * width
        row = {"b": block, "k": channels, "w": width, "names": [group.group for group in members]}
        row["v"] = [_rounded(value) for value in largest.max(axis=1)]
        row["c"] = channel.tolist()
        # One group is the rule; an index for every cell would only repeat 0.
        row["n"] = padded[:, channel].argmax(axis=0).tolist() if len(members) > 1 else []
        rows.append(row)
    return rows


def _ranked(group: GroupOutliers) -> dict[str, Any]:
    """One sorted curve: rank, channel and |x| of its points; zeros have no place on a log axis."""
    order = [int(channel) for channel in np.argsort(group.abs_max, kind="stable")[::-1]]
    order = [channel for channel in order if _positive(group.abs_max[channel])]
    ranks = [int(rank) for rank in np.unique(np.geomspace(1, max(len(order), 1), RANKS).round())][: len(order)]
    channels = [order[rank - 1] for rank in ranks]
    values = [_rounded(group.abs_max[channel]) for channel in channels]
    curve = {"rank": ranks, "channel": channels, "value": values}
    return {"group": group.group, "danger": group.danger, "b": group.block, **curve}


def _distinct(entries: Iterable[MassiveEntry]) -> list[dict[str, Any]]:
    """Entries at one block, position and channel as one circle with the largest value; largest first."""
    places: dict[tuple[int, int, int], list[MassiveEntry]] = defaultdict(list)
    for entry in entries:
        if _positive(abs(entry.value)):
            places[entry.block, entry.position, entry.channel].append(entry)
    rows = []
    for (block, position, channel), same_place in places.items():
        largest = max(same_place, key=lambda entry: abs(entry.value))
        row: dict[str, Any] = {"b": block, "position": position, "channel": channel, "value": _rounded(largest.value)}
        row |= {"size": _rounded(abs(largest.value)), "ratio": _rounded(largest.ratio), "text": repr(largest.text)}
        rows.append({**row, "sequences": len({entry.sequence for entry in same_place})})
    rows.sort(key=lambda row: -row["size"])
    shown = list(dict.fromkeys(row["channel"] for row in rows))[: len(CHANNEL_COLOURS)]
    for row in rows:
        row["colour"] = str(row["channel"]) if row["channel"] in shown else "other"
    return rows


def _error_row(group: GroupOutliers, scheme: str) -> dict[str, Any]:
    after = error_after(group, scheme)
    row = {"b": group.block, "group": group.group, "danger": group.danger, "before": _rounded(group.errors[scheme])}
    drawn = _rounded(after) if after is not None and _positive(after) else None
    return {**row, "after": drawn, "remedy": group.remedy or "none"}


def _blocks(report: OutlierReport) -> list[int]:
    """All block numbers, so that a role that is missing in some blocks keeps its rows."""
    return sorted({block.block for block in report.blocks} | {group.block for group in report.groups})


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _rounded(value: float) -> float:
    """Four significant digits: more cannot be seen, and every one costs bytes."""
    return float(f"{value:.4g}")
