"""Block floating point, and channels in order of their size before it. d-Matrix 2024, arXiv:2403.20137.

One exponent a block: with channels of one size in one block, a loud one does not take the bits of quiet ones. The order
merges into the rows of q and k where there is no RoPE, and into v and o always; here it is taken at the cache.
"""

from __future__ import annotations

import torch

from outlierq.ops.caches.uniform import in_groups

BLOCK, MANTISSA = 32, 4  # BFP12 of the paper: sign and 3 bits, 8 bits of exponent a block


def block_floating_point(x: torch.Tensor, mantissa: int = MANTISSA, block: int = BLOCK) -> torch.Tensor:
    """Numbers [..., n] in blocks: step 2^(e - mantissa + 2), e the exponent of the largest."""
    blocks = in_groups(x.float(), block)
    _, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # largest = [0.5, 1) 2^exponent
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 1 - (mantissa - 2))
    most = 2 ** (mantissa - 1) - 1
    return ((blocks / step).round().clamp(-most, most) * step).flatten(-2).to(x.dtype)


def channel_order(x: torch.Tensor) -> torch.Tensor:
    """Keys or values of some tokens, [tokens, kv heads, D]: the channels of each head by rising norm, [kv heads, D]."""
    return x.float().square().sum(0).argsort(-1)


def sorted_blocks(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[sequences, kv heads, tokens, D] in block floating point, channels in order."""
    index = order.to(x.device)[None, :, None].expand(x.shape)
    done = block_floating_point(x.gather(-1, index))
    return torch.empty_like(done).scatter_(-1, index, done)
