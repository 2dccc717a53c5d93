"""RotateKV: keys before RoPE, turned over several heads, channels in order of their means. arXiv:2501.16383.

The paper's code takes 2^b - 1 as b^2 - 1, so that 3 bits have 8 steps; here they have 7.
"""

from __future__ import annotations

import torch

from outlierq.ops.caches.uniform import in_groups, rounded
from outlierq.ops.hadamard import hadamard_transform

HEADS, GROUP = 4, 128  # turned together, and rounded together
CLIP = {2: 0.8}  # of the range, at so many bits


def turned(x: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """[..., kv heads, D] by one Hadamard matrix over as many as 4 heads; `back`: the inverse."""
    heads, size = x.shape[-2:]
    together = next(count for count in (HEADS, 2, 1) if heads % count == 0)
    parts = x.float().reshape(*x.shape[:-2], heads // together, together * size)
    return hadamard_transform(parts, transpose=back).reshape(x.shape)


def channel_order(keys: torch.Tensor) -> torch.Tensor:
    """Keys before RoPE, [tokens, kv heads, D]: the channels of all heads, turned, by rising mean. [kv heads * D]."""
    return turned(keys).flatten(1).mean(0).argsort()


def keys(key: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """Keys before RoPE, [sequences, kv heads, tokens, D], turned, in order, rounded by token, and all of it undone."""
    channels = turned(key.transpose(1, 2)).flatten(2)[..., order]
    done = rounded(in_groups(channels, GROUP), bits, CLIP.get(bits, 1.0)).flatten(2)[..., order.argsort()]
    return turned(torch.unflatten(done, 2, (key.shape[1], -1)), back=True).transpose(1, 2).to(key.dtype)


def values(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of the same shape, each head turned (`rotate` merges that into weights) and rounded by token."""
    turned_heads = hadamard_transform(value.float()).transpose(1, 2).flatten(2)
    done = rounded(in_groups(turned_heads, GROUP), bits, CLIP.get(bits, 1.0)).flatten(2)
    by_head = torch.unflatten(done, 2, (value.shape[1], -1))
    return hadamard_transform(by_head, transpose=True).transpose(1, 2).to(value.dtype)
