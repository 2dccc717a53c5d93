"""KIVI: keys by channel, values by token, the newest tokens as they are. Liu et al. 2024, arXiv:2402.02750."""

from __future__ import annotations

import torch

from outlierq.ops.caches.uniform import in_groups, rounded

GROUP = 32  # tokens of a channel, or channels of a token, with one step and zero point
RECENT = 128  # newest tokens in 16 bits, as in the paper's tables


def keys(key: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys after RoPE, [sequences, kv heads, tokens, D], each channel in groups of tokens. The last tokens that fill no
    group stay as they are."""
    whole = key.shape[2] // GROUP * GROUP
    if not whole:
        return key
    by_channel = key[:, :, :whole].transpose(2, 3)
    done = rounded(in_groups(by_channel, GROUP), bits).flatten(3).transpose(2, 3).to(key.dtype)
    return torch.cat([done, key[:, :, whole:]], 2)


def values(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of the same shape, each token in groups of channels."""
    return rounded(in_groups(value, GROUP), bits).flatten(3).to(value.dtype)


def seen_rounded(tokens: int, recent: int = RECENT) -> torch.Tensor:
    """Bool [tokens, tokens]: which of the tokens (columns) each query (row) finds rounded: in whole groups, and older
    than the `recent` newest ones."""
    limit = ((torch.arange(tokens) + 1 - recent).clamp(min=0) // GROUP) * GROUP
    return torch.arange(tokens)[None] < limit[:, None]
