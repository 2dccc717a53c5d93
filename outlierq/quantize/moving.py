"""Numbers of groups spread over weights, and gathered again: what learning of scales and codes shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outlierq.core.scheme import QuantScheme


def spread(values: torch.Tensor, scheme: QuantScheme, shape: Sequence[int]) -> torch.Tensor:
    """Numbers of groups [rows, groups] for every weight [out, in]."""
    height = 1 if scheme.block is None else scheme.block[0]
    tall = values if height == 1 else values.repeat_interleave(height, 0)[: shape[0]]
    return tall.repeat_interleave(scheme.columns_per_group(shape[1]), 1)[:, : shape[1]]


def gathered(values: torch.Tensor, scheme: QuantScheme, shape: Sequence[int]) -> torch.Tensor:
    """Sums over the weights [out, in] of every group [rows, groups]: what `spread` is the transpose of."""
    height, width = (1 if scheme.block is None else scheme.block[0]), scheme.columns_per_group(values.shape[1])
    more = (0, shape[1] * width - values.shape[1], 0, shape[0] * height - values.shape[0])
    return torch.nn.functional.pad(values, more).view(shape[0], height, shape[1], width).sum((1, 3))
