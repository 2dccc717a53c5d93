"""Inputs and CPU results of `selftest.cu`, which uses every wrapper of `ptx.cuh` once."""

from __future__ import annotations

import torch

from outlierq.kernels import plan
from shim import build, guarded


def wrapper_inputs(dtype: torch.dtype) -> torch.Tensor:
    """Bits for `selftest`: fragments of small whole numbers, so that sums are exact in any order."""
    g = torch.Generator().manual_seed(1)
    words = torch.empty(32, 16, dtype=torch.int32)
    words[:, :6] = torch.randint(-8, 9, (32, 12), generator=g).to(dtype).view(torch.int32)
    words[:, 6:10] = torch.randint(-99, 100, (32, 4), generator=g).float().view(torch.int32)
    words[:, 10:12] = (torch.randn(32, 4, generator=g) * torch.tensor([1, 3e-5, 50, 1e-3])).to(dtype).view(torch.int32)
    words[:, 12:14] = (torch.randn(32, 2, generator=g) * torch.tensor([1e-4, 9.0])).view(torch.int32)
    words[:, 14:] = torch.randint(-(2**31), 2**31, (32, 2), generator=g).int()
    return words


def emulated(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the CPU makes of them, int32 [32, 32]."""
    results = guarded(torch.zeros(32, 32, dtype=torch.int32))
    build("selftest").run(plan.plan_selftest(guarded(words), results, dtype))
    return results
