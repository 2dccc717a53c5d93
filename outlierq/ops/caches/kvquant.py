"""KVQuant: keys before RoPE on levels that were learned, by channel; one outlier in a hundred apart. arXiv:2401.18079.

The paper weighs the levels by squared gradients; here every value counts alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outlierq.ops.one_dimension import k_means

OUTLIERS = 0.01  # of a channel's or a token's numbers, kept in 16 bits
SAMPLE = 1 << 18  # numbers from which levels are learned


@dataclass(frozen=True)
class Levels:
    """What calibration says. low, high: [kv heads, D] of keys before RoPE, but for outliers. keys, values: [2^bits]
    levels between -1 and 1, ascending."""

    low: torch.Tensor
    high: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def learned(keys: torch.Tensor, values: torch.Tensor, bits: int) -> Levels:
    """From keys before RoPE and values of some tokens, [tokens, kv heads, D]."""
    ends = torch.tensor([OUTLIERS / 2, 1 - OUTLIERS / 2])
    low, high = keys.float().quantile(ends, dim=0)
    by_channel = _to_range(keys.float(), low, high)
    flat = values.float().flatten(1)
    by_token = _to_range(flat, *_token_range(flat))
    return Levels(low, high, _levels(by_channel, bits), _levels(by_token, bits))


def keys(key: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Keys before RoPE, [sequences, kv heads, tokens, D]."""
    low, high = levels.low[:, None], levels.high[:, None]
    return _on_levels(key, low, high, levels.keys)


def values(value: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Values of the same shape, the range that of each token over all heads."""
    flat = value.float().transpose(1, 2).flatten(2)
    done = _on_levels(flat, *_token_range(flat), levels.values)
    return torch.unflatten(done, 2, (value.shape[1], -1)).transpose(1, 2).to(value.dtype)


def _token_range(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest number of every token [..., n] but for its outliers."""
    apart = round(OUTLIERS / 2 * flat.shape[-1])
    ordered = flat.sort(-1).values
    return ordered[..., apart, None], ordered[..., flat.shape[-1] - 1 - apart, None]


def _to_range(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Numbers between low and high as -1 to 1."""
    return (2 * x - high - low) / (high - low).clamp(min=1e-12)


def _levels(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The means of the clusters with the least squared error; of those within -1 and 1."""
    x = x.flatten()
    x = x[x.abs() <= 1]
    x = x[:: max(1, len(x) // SAMPLE)]
    bounds = k_means(x, 2**bits).to(x.dtype)
    cluster = torch.bucketize(x, bounds)
    sums = torch.zeros(len(bounds) + 1).index_add_(0, cluster, x)
    return sums / torch.bincount(cluster, minlength=len(sums)).clamp(min=1)


def _on_levels(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest level of every number; outliers stay as they are."""
    levels = levels.to(x.device)
    part = _to_range(x.float(), low.to(x.device), high.to(x.device))
    near = levels[torch.bucketize(part.contiguous(), (levels[1:] + levels[:-1]) / 2)]
    done = (near * (high - low).to(x.device) + (high + low).to(x.device)) / 2
    return torch.where(part.abs() > 1, x.float(), done).to(x.dtype)
