"""Channel ratio: the largest channel against the median one, and which channels stand out.

max_c a_c / median_c a_c with a_c = max_t |x_tc|: the figure behind SmoothQuant (Xiao et al. 2022, arXiv:2211.10438,
section 4) and most pictures of activation outliers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outlierq.core.errors import StatsError
from outlierq.core.stats import InputStats

# An int8 grid that holds a channel this much larger than the median one leaves the median channel 10 of its 127 steps:
# little more than 4 bits with the sign. Natural channels of SmolLM2-135M reach 9.3; scaled by 20 they have 17 or more.
STANDS_OUT = 12.7
# Modified z-score of log2(ratio) above which a value is no tail of a wide distribution: Iglewicz and Hoaglin 1993.
MODIFIED_Z = 3.5
NORMAL_MAD = 0.6745  # median |z| of a standard normal


def channel_ratios(abs_max: torch.Tensor) -> torch.Tensor:
    """[K] every channel's largest |x| over that of the median channel; StatsError when the median channel is 0."""
    median = abs_max.median()
    if median <= 0:
        raise StatsError(
            "at least half of the channels are 0 in every token, so there is no median to compare with",
            hint="read `abs_max` itself",
        )
    return abs_max / median


def channel_ratio(stats: InputStats) -> float:
    """The largest of `channel_ratios`, from abs_max [K]."""
    return channel_ratios(stats.need("abs_max")).max().item()


def standing_out(ratios: torch.Tensor) -> tuple[int, ...]:
    """Channels, ascending, whose ratio [K] is at least `STANDS_OUT` and far outside of the spread of all channels.

    Far outside: (log2 r_c - median) * 0.6745 / MAD > 3.5, the modified z-score. It refuses the upper end of a
    distribution that is wide as a whole, where no channel is different in kind.
    """
    log = ratios.clamp(min=2.0**-24).log2()
    centred = log - log.median()
    score = centred * NORMAL_MAD / centred.abs().median().clamp(min=1e-6)
    return tuple(((ratios >= STANDS_OUT) & (score > MODIFIED_Z)).nonzero().flatten().tolist())


def persistent_channels(blocks: Sequence[Sequence[torch.Tensor]]) -> tuple[int, ...]:
    """Channels of the residual stream that stand out in most blocks.

    blocks: for each block the ratios [H] of every input that reads the normalised stream. A channel's figure in a
    block is the largest of them, its figure in the model the median over blocks: half of the blocks must show it.
    """
    largest = [torch.stack(list(ratios)).amax(0) for ratios in blocks if ratios]
    return standing_out(torch.stack(largest).median(0).values) if largest else ()
