"""`InputStats` straight from its definition: all tokens at once, float64, no streaming."""

from __future__ import annotations

import torch

from outlierq.core.stats import InputStats


def statistics_of(x: torch.Tensor, *, sequence_length: int | None = None) -> InputStats:
    """Every statistic of the tokens `x` [tokens, K], cut into sequences of `sequence_length` (one if None)."""
    sequences = x.view(-1, sequence_length or len(x), x.shape[1])
    wide = x.double()
    large = sequences.abs() >= 6
    return InputStats(
        tokens=len(x),
        sequences=len(sequences),
        min=x.amin(0),
        max=x.amax(0),
        sum_x=wide.sum(0),
        sum_abs=wide.abs().sum(0),
        sum_sq=wide.pow(2).sum(0),
        sum_cube=wide.pow(3).sum(0),
        sum_fourth=wide.pow(4).sum(0),
        count_large=large.sum((0, 1)).double(),
        sequence_large=large.double().mean(1).sum(0),
        first_abs_max=sequences[:, 0].abs().amax(0),
        hessian=(wide.T @ wide / len(x)).float(),
        rows=x[:32].bfloat16(),
    )


def correlated_inputs(tokens: int, channels: int, *, seed: int = 0, outliers: int = 2) -> torch.Tensor:
    """[tokens, channels] float32 as language models have them: a few shared directions, a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, channels // 8, generator=generator)
    x = shared @ torch.randn(channels // 8, channels, generator=generator)
    x += torch.randn(tokens, channels, generator=generator)
    x[:, torch.randperm(channels, generator=generator)[:outliers]] *= 20
    return x


def random_weight(rows: int, columns: int, *, seed: int = 1) -> torch.Tensor:
    """[rows, columns] float32 of the size of trained weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def row_errors(change: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """[out] output error d H d^T of every row, float64."""
    change, hessian = change.double(), hessian.double()
    return ((change @ hessian) * change).sum(1)
