"""The pictures of an outlier report: where channels stand out, massive activations, and what both would cost.

Colour is always a ratio to what is usual in the same panel, so that a quiet input can be read beside a loud one.
"""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from outlierq.core.measured.outliers import BlockOutliers, GroupOutliers, MassiveEntry, OutlierReport
from outlierq.detect.verdict import ERRORS
from outlierq.report.pages.drawing import (
    BOTTOM,
    LEFT,
    LEVELS,
    PAGE,
    RIGHT,
    TOP,
    WIDTH,
    Panel,
    Picture,
    Theme,
    image,
    line,
    powers,
    text,
    ticks,
    titled,
    upright,
)

PREFERRED_SCHEME = "w8a8"
COLUMNS = 384  # more cells than pixels on a usual screen
TOP_RATIO = 100.0  # the last colour: as SmoothQuant describes outliers (arXiv:2211.10438)
MOST_CHANNELS = 24  # of massive activations
ROW = 5.0  # height of a block in a map

Height = Callable[[float], float]  # where a value lies


def pictures(report: OutlierReport, theme: Theme = PAGE) -> tuple[Picture, ...]:
    """All pictures of a report, in the order in which they are read."""
    return channel_map(report, theme), massive_map(report, theme), error_chart(report, theme)


def channel_map(report: OutlierReport, theme: Theme = PAGE) -> Picture:
    """Blocks x channels for every role; colour is the largest |x| of a channel over the panel's median channel."""
    roles = by_role(report.groups)
    panels = [_channel_panel(role, groups, theme) for role, groups in roles.items()]
    return Picture(
        "channels",
        "Where the outliers are",
        "A row is a decoder block, a column a channel of the input. Colour is the channel's largest value as a "
        "multiple of the median channel of the same panel: a vertical line is a channel that stands out in "
        "block after block.",
        tuple(panel for panel in panels if panel is not None),
        "The statistics hold no channel maxima above zero.",
    )


def _channel_panel(role: str, groups: Sequence[GroupOutliers], theme: Theme) -> Panel | None:
    """None where no channel is above zero."""
    blocks = sorted({group.block for group in groups})
    largest = _largest_by_block(groups, blocks)  # [blocks, channels]
    alive = largest[largest > 0]
    if not len(alive):
        return None
    median = float(np.median(alive))
    ratios = np.maximum(largest / median, 1e-9)
    width = math.ceil(ratios.shape[1] / COLUMNS)
    cells = _columns(ratios, width)
    worst = np.unravel_index(int(ratios.argmax()), ratios.shape)
    top, channel, block = float(ratios.max()), int(worst[1]), blocks[int(worst[0])]
    drawing, height = _map(_levels(cells, TOP_RATIO, LEVELS - 1), blocks, ratios.shape[1], theme)
    remark = f"up to {times(top)} the median, in block {block}, channel {channel}"
    read = {"blocks": blocks, "columns": cells.shape[1], "width": width, "top": max(top, 10.0)}
    read["levels"] = base64.b64encode(_levels(cells, max(top, 10.0), 255).tobytes()).decode()
    alt = f"{role}: {len(blocks)} blocks by {ratios.shape[1]} channels, {remark}."
    return Panel(role, remark, alt, drawing, height, read)


def _largest_by_block(groups: Sequence[GroupOutliers], blocks: Sequence[int]) -> np.ndarray:
    """[blocks, channels] largest |x|; of several inputs in a block (experts) the largest. What is not finite is 0."""
    largest = np.zeros((len(blocks), max(len(group.abs_max) for group in groups)))
    for group in groups:
        values = np.nan_to_num(np.asarray(group.abs_max, float), nan=0.0, posinf=0.0, neginf=0.0)
        row = largest[blocks.index(group.block), : len(values)]
        np.maximum(row, values, out=row)
    return largest


def _columns(ratios: np.ndarray, width: int) -> np.ndarray:
    """[blocks, columns] of [blocks, channels]: the largest of `width` neighbours."""
    rest = -ratios.shape[1] % width
    padded = np.pad(ratios, ((0, 0), (0, rest)))
    columns: np.ndarray = padded.reshape(len(ratios), -1, width).max(axis=2)
    return columns


def _levels(ratios: np.ndarray, top: float, last: int) -> np.ndarray:
    """uint8, 0 for the median and below, `last` for `top` and above, by the logarithm; any shape."""
    levels: np.ndarray = np.round(np.log(np.clip(ratios, 1.0, top)) / math.log(top) * last).astype(np.uint8)
    return levels


def _map(levels: np.ndarray, blocks: Sequence[int], channels: int, theme: Theme) -> tuple[str, float]:
    """A map with numbers of blocks and channels at its sides; the drawing and its height."""
    tall = max(40.0, ROW * len(blocks))
    wide, row = WIDTH - LEFT - RIGHT, tall / len(blocks)
    inside = image(levels, (LEFT, TOP, wide, tall), theme)
    for place in ticks(blocks):
        inside += text(LEFT - 5, TOP + (place + 0.5) * row + 4, blocks[place], theme.muted, "end")
    inside += upright(10, TOP + tall / 2, "block", theme.muted)
    for share, anchor in ((0, "start"), (1, "end")):
        inside += text(LEFT + share * wide, TOP + tall + 15, round(share * (channels - 1)), theme.muted, anchor)
    inside += text(LEFT + wide / 2, TOP + tall + 15, "channel", theme.muted, "middle")
    return inside, TOP + tall + BOTTOM


def massive_map(report: OutlierReport, theme: Theme = PAGE) -> Picture:
    """Channels x blocks of massive activations (arXiv:2402.17762), by the size of the largest value."""
    largest = _massive_by_place(report.blocks)
    panel = _massive_panel(largest, sorted({block.block for block in report.blocks}), theme) if largest else None
    return Picture(
        "massive",
        "Massive activations",
        "Single values of the residual stream after a block, more than 100 and 1,000 times the median. A row is a "
        "channel, a column a block; they usually sit on the first token and stay where they appeared.",
        () if panel is None else (panel,),
        "No massive activations were found in the residual stream.",
    )


def _massive_by_place(blocks: Iterable[BlockOutliers]) -> dict[tuple[int, int], MassiveEntry]:
    """The largest entry by block and channel, of the channels with the largest ones."""
    largest: dict[tuple[int, int], MassiveEntry] = {}
    for entry in (entry for block in blocks for entry in block.massive):
        place = entry.block, entry.channel
        size = abs(entry.value)
        if math.isfinite(size) and (place not in largest or size > abs(largest[place].value)):
            largest[place] = entry
    sizes: dict[int, float] = defaultdict(float)
    for (_, channel), entry in largest.items():
        sizes[channel] = max(sizes[channel], abs(entry.value))
    drawn = sorted(sizes, key=lambda channel: -sizes[channel])[:MOST_CHANNELS]
    return {place: entry for place, entry in largest.items() if place[1] in drawn}


def _massive_panel(largest: dict[tuple[int, int], MassiveEntry], blocks: Sequence[int], theme: Theme) -> Panel:
    """Channels from top to bottom, blocks from left to right; the area of a dot is the size of the value."""
    channels = sorted({channel for _, channel in largest})
    row, column = 15.0, (WIDTH - LEFT - RIGHT) / len(blocks)
    tall, radius = row * len(channels), min(row, max(column, 6.0)) / 2
    most = max(abs(entry.value) for entry in largest.values())
    inside = ""
    for place, channel in enumerate(channels):
        y = TOP + (place + 0.5) * row
        inside += line(LEFT, y, WIDTH - RIGHT, y, theme.rule) + text(LEFT - 5, y + 4, channel, theme.muted, "end")
    for (block, channel), entry in largest.items():
        x, y = LEFT + (blocks.index(block) + 0.5) * column, TOP + (channels.index(channel) + 0.5) * row
        size = max(1.2, radius * math.sqrt(abs(entry.value) / most))
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" fill="{theme.accent}">'
        inside += titled(circle, "circle", _massive_words(entry))
    inside += text(LEFT - 5, TOP + tall + 15, "block", theme.muted, "end")
    for place in ticks(blocks, 6):
        inside += text(LEFT + (place + 0.5) * column, TOP + tall + 15, blocks[place], theme.muted, "middle")
    top = max(largest.values(), key=lambda entry: abs(entry.value))
    remark = f"largest {_massive_words(top)}"
    alt = f"Massive activations of {len(channels)} channels after {len({b for b, _ in largest})} blocks; {remark}."
    return Panel("residual stream", remark, alt, inside, TOP + tall + BOTTOM)


def _massive_words(entry: MassiveEntry) -> str:
    token = f"token {entry.text!r}" if entry.text else f"token {entry.token}"
    ratio = f", {times(entry.ratio)} the median" if math.isfinite(entry.ratio) else ""
    return f"{entry.value:,.0f} after block {entry.block}, channel {entry.channel}, on {token}{ratio}"


def error_chart(report: OutlierReport, theme: Theme = PAGE) -> Picture:
    """Predicted relative output error by block, before and after the remedy, one panel for every role."""
    scheme = main_scheme(report.groups)
    roles = by_role(group for group in report.groups if _positive(group.errors.get(scheme)))
    panels = [_error_panel(role, groups, scheme, theme) for role, groups in roles.items()]
    return Picture(
        "errors",
        "How bad they are",
        f"Predicted relative error of the output in plain {scheme.upper()}, block by block: a ring as it is, a dot "
        "with the input's remedy. Above the upper line an input is dangerous, above the lower one it deserves a look."
        if scheme
        else "",
        tuple(panels),
        "The report holds no predicted errors.",
    )


def _error_panel(role: str, groups: Sequence[GroupOutliers], scheme: str, theme: Theme) -> Panel:
    before = worst_by_block(groups, scheme)
    after = {group.block: error_after(group, scheme) for group in before.values()}
    values = [group.errors[scheme] for group in before.values()] + [
        v for v in after.values() if v is not None and _positive(v)
    ]
    low, high = math.log10(0.7 * min(*values, 1e-3)), math.log10(1.3 * max(*values, 2e-2))
    tall, wide, blocks = 110.0, WIDTH - LEFT - RIGHT, sorted(before)
    step = wide / len(blocks)

    def y(value: float) -> float:
        return TOP + tall * (high - math.log10(value)) / (high - low)

    inside = _error_axis(theme, (low, high), y, wide)
    inside += text(LEFT - 5, TOP + tall + 15, "block", theme.muted, "end")
    for place, block in enumerate(blocks):
        x, group = LEFT + (place + 0.5) * step, before[block]
        inside += _error_marks(x, y, group, scheme, after[block], min(3.2, step / 2), theme)
    for place in ticks(blocks):
        inside += text(LEFT + (place + 0.5) * step, TOP + tall + 15, blocks[place], theme.muted, "middle")
    top = max(before.values(), key=lambda group: group.errors[scheme])
    left = after[top.block]
    remark = f"at worst {percent(top.errors[scheme])} in block {top.block}"
    remark += f", {percent(left)} with {top.remedy}" if left is not None else ""
    return Panel(
        role, remark, f"{role}: predicted error in {len(blocks)} blocks, {remark}.", inside, TOP + tall + BOTTOM
    )


def _error_axis(theme: Theme, bounds: tuple[float, float], y: Height, wide: float) -> str:
    """Powers of ten at the side, thresholds across."""
    drawn, limit = powers(bounds, y, wide, theme), ERRORS[PREFERRED_SCHEME]
    for value in (limit.watch, limit.dangerous):
        drawn += line(LEFT, y(value), LEFT + wide, y(value), theme.accent, "3 3")
    return drawn


def _error_marks(
    x: float, y: Height, group: GroupOutliers, scheme: str, after: float | None, radius: float, theme: Theme
) -> str:
    """A ring for the error as it is, a dot for what the remedy leaves, joined."""
    error = group.errors[scheme]
    words = f"{group.group}: {percent(error)}" + (
        f", {percent(after)} with {group.remedy}" if after is not None else ""
    )
    colour = theme.accent if group.danger == "dangerous" else theme.muted
    joined = dot = ""
    if after is not None and _positive(after):
        joined = line(x, y(error), x, y(after), theme.rule)
        dot = f'<circle cx="{x:.1f}" cy="{y(after):.1f}" r="{radius * 0.7:.1f}" fill="{theme.muted}"/>'
    ring = (
        f'<circle cx="{x:.1f}" cy="{y(error):.1f}" r="{radius:.1f}" fill="{theme.paper}" stroke="{colour}" '
        'stroke-width="1.4">'
    )
    return joined + titled(ring, "circle", words) + dot


# Values


def by_role(groups: Iterable[GroupOutliers]) -> dict[str, list[GroupOutliers]]:
    """Groups under their role, in the order of first appearance."""
    roles: dict[str, list[GroupOutliers]] = defaultdict(list)
    for group in groups:
        roles[group.role].append(group)
    return dict(roles)


def worst_by_block(groups: Iterable[GroupOutliers], scheme: str) -> dict[int, GroupOutliers]:
    """Of several groups of one block (experts) the one with the largest error."""
    worst: dict[int, GroupOutliers] = {}
    for group in groups:
        if group.block not in worst or group.errors[scheme] > worst[group.block].errors[scheme]:
            worst[group.block] = group
    return worst


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


def percent(share: float | None) -> str:
    """A share of 1 as a percentage with two significant digits; a dash for what is not known."""
    if share is None or not math.isfinite(share):
        return "–"
    value = 100 * share
    return f"{value:,.0f}\u202f%" if abs(value) >= 10 else f"{value:.2g}\u202f%"


def times(ratio: float) -> str:
    """As often: 3.4×, 120×, 12,000×."""
    return f"{ratio:.2g}×" if ratio < 10 else f"{float(f'{ratio:.3g}'):,.0f}×"


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
