"""What the grid of a scheme takes in storage."""

from __future__ import annotations

import torch

from outlierq.core.scheme import QuantScheme


def grid_bits(scheme: QuantScheme, length: int) -> float:
    """Bits per weight of scales, and of zero points where there are any: one for each group of `length` weights."""
    scale: int = getattr(torch, scheme.scale_dtype).itemsize * 8
    return (scale + (0 if scheme.symmetric else scheme.bits)) / scheme.columns_per_group(length)
