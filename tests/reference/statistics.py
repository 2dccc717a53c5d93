"""`InputStats` straight from its definition: all tokens at once, float64, no streaming."""

from __future__ import annotations

import numpy as np
import torch

from outlierq.core.stats import InputStats


def statistics_of(x: torch.Tensor, *, sequence_length: int | None = None) -> InputStats:
    """Every statistic of the tokens `x` [tokens, K], cut into sequences of `sequence_length` (one if None).

    The inputs of the original model are the same.
    """
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
        count_huge=(sequences.abs() >= 20).sum((0, 1)).double(),
        cross=torch.zeros(x.shape[1], x.shape[1]),
        **tables_of(sequences.numpy()),
    )


def tables_of(x: np.ndarray, ids: np.ndarray | None = None, *, stride: int = 1) -> dict[str, torch.Tensor]:
    """The tables of [sequences, tokens, K] one token after another; values of every `stride`th go into the histogram.

    ids: [sequences, tokens].
    """
    channels = x.shape[-1]
    log2, tokens = np.zeros((channels, 48), np.int32), np.zeros(64, np.int64)
    entries = []
    for sequence, position in np.ndindex(x.shape[:2]):
        token = np.abs(x[sequence, position].astype(np.float64))
        with np.errstate(divide="ignore"):
            bins = np.clip(np.floor(np.log2(token)) + 24, 0, 47).astype(int)
            tokens[int(np.clip(np.floor(2 * np.log2(token.max())) + 32, 0, 63))] += 1
        if (sequence * x.shape[1] + position) % stride == 0:
            log2[np.arange(channels), bins] += 1
        channel, median = int(token.argmax()), np.sort(token)[(channels - 1) // 2]
        number = -1 if ids is None else int(ids[sequence, position])
        entries.append((sequence, position, number, channel, float(x[sequence, position, channel]), median))
    top = sorted(entries, key=lambda entry: -abs(entry[4]))[:20]
    return {
        "log2_histogram": torch.from_numpy(log2),
        "token_histogram": torch.from_numpy(tokens),
        "top_tokens": torch.tensor(top, dtype=torch.float32),
    }


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
