"""Massive activations in the residual stream. Sun et al. 2024, arXiv:2402.17762, section 2.

An entry with |h| > 100 and at least 1000 times the median |h| of the block's output, over channels and tokens (the
token's own median is no measure: a massive activation raises the other channels of its token, too). They sit in few
fixed channels at few tokens (the first, the first full stop), appear after an early block and act as a constant bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from outlierq.core.measured.block_stats import TOP_COLUMNS, BlockStats
from outlierq.core.measured.outliers import MassiveEntry

LARGEST = 100.0
RATIO = 1000.0
COLUMN = {name: place for place, name in enumerate(TOP_COLUMNS)}


def massive_entries(block: int, stats: BlockStats) -> tuple[MassiveEntry, ...]:
    """The massive ones among the largest entries [n, 6] of a block's output, largest first; their text comes later."""
    median = stats.need("residual_median").item()
    entries = [_entry(block, row, median) for row in stats.need("residual_top").tolist()]
    massive = [entry for entry in entries if abs(entry.value) > LARGEST and entry.ratio >= RATIO]
    return tuple(sorted(massive, key=lambda entry: -abs(entry.value)))


def _entry(block: int, row: list[float], median: float) -> MassiveEntry:
    """One row of `TOP_COLUMNS`. A median of 0 counts as the smallest positive float32."""
    place = {name: int(row[COLUMN[name]]) for name in ("sequence", "position", "token", "channel")}
    value = row[COLUMN["value"]]
    return MassiveEntry(block=block, text="", value=value, ratio=abs(value) / max(median, 1e-38), **place)


def persistent_share(stats: BlockStats) -> float:
    """Share, 0..1, of the sequences whose largest entry sits in the most common channel with a steady value.

    0 when that channel's values vary by 20 % or more (standard deviation over mean): then it is no constant bias.
    From residual_first [sequences, 6].
    """
    first = stats.need("residual_first")
    channels = first[:, COLUMN["channel"]].long()
    common = channels.mode().values
    values = first[channels == common, COLUMN["value"]].double()
    steady = values.std(correction=0) < 0.2 * values.mean().abs()
    return (len(values) / len(first)) if steady else 0.0


def super_weight(
    entry: MassiveEntry, weight: torch.Tensor, top_tokens: torch.Tensor
) -> tuple[int, float, float] | None:
    """Which weight wrote a massive entry: (input channel j, weight, product weight * x_j); None when unknown.

    weight: [H, in] of a linear that writes into the stream; top_tokens: of its input. The token's largest input times
    one "super weight" makes the entry (Yu et al. 2024, arXiv:2411.07191).
    """
    for row in top_tokens.tolist():
        same = row[COLUMN["sequence"]] == entry.sequence and row[COLUMN["position"]] == entry.position
        if same:
            channel = int(row[COLUMN["channel"]])
            value = weight[entry.channel, channel].item()
            return channel, value, value * row[COLUMN["value"]]
    return None


def emergence(massive: Mapping[int, tuple[MassiveEntry, ...]]) -> int | None:
    """The first block whose output holds a massive activation."""
    return min((block for block, entries in massive.items() if entries), default=None)
