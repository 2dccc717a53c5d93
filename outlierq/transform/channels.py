"""Values per input channel that transforms share: ties between channels, bounds of scales, powers of two."""

from __future__ import annotations

import torch

# Scales further from their geometric middle would leave the range in which float16 is precise.
LARGEST_SCALE = 1024.0


def tied_max(values: torch.Tensor, tie: torch.Tensor | None) -> torch.Tensor:
    """The largest of `values` [in] over the channels that share a producer channel."""
    if tie is None:
        return values
    largest = torch.full((int(tie.max()) + 1,), -torch.inf, dtype=values.dtype, device=values.device)
    return largest.scatter_reduce_(0, tie, values, "amax")[tie]


def evened(scale: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """`scale` divided by the geometric mean of its living channels, within `LARGEST_SCALE`; dead channels are 1.

    scale: [in]. alive: [in] bool. A factor common to all channels changes nothing: grids follow it.
    """
    if not alive.any():
        return torch.ones_like(scale)
    middle = scale[alive].log().mean().exp()
    bounded = (scale / middle).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
    return torch.where(alive, bounded, torch.ones_like(scale))


def nearest_powers_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Each scale [in] rounded to a power of two, on a logarithmic axis."""
    return scale.log2().round().exp2()
