"""Scales of an fp8 KV cache: the largest key and value that calibration saw fit E4M3 (Micikevicius et al. 2022)."""

from __future__ import annotations

import torch

from outlierq.core.errors import NumbersError
from outlierq.core.scheme import FP8_MAX, CacheScheme

# So that a head that saw nothing but zeros still has a scale that 16 bits hold and a client can divide by.
SMALLEST = 1e-6


def cache_scale(abs_max: torch.Tensor, scheme: CacheScheme, dtype: torch.dtype) -> torch.Tensor:
    """max|x| / 448, at least 1e-6, in `dtype`: [1] of the whole tensor, or [kv heads, 1, 1].

    abs_max: [kv heads, head size] largest |x| of keys (after RoPE) or of values (arXiv:2209.05433, table 1: the largest
    E4M3 value is 448). NumbersError when it is not finite.
    """
    if not abs_max.isfinite().all():
        raise NumbersError("the keys or values seen in calibration hold a NaN or Inf", hint="calibrate again")
    largest = abs_max.amax().reshape(1) if scheme.per == "tensor" else abs_max.amax(1).reshape(-1, 1, 1)
    scale = (largest.float() / FP8_MAX).clamp(min=SMALLEST).to(dtype)
    if not scale.isfinite().all() or (scale <= 0).any():
        raise NumbersError(f"the cache scale {largest.max().item() / FP8_MAX:g} cannot be stored as {dtype}")
    return scale
