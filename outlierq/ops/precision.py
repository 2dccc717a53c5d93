"""Matrix products on a CPU's bfloat16 units, where the operands allow it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_operands() -> Iterator[None]:
    """Inside, float32 matrix products on a CPU round their operands to bfloat16 and accumulate in float32.

    Exact for operands that came from bfloat16; several times faster where the CPU has matrix units for it. Elsewhere
    it changes nothing. GPU products are not touched (no TF32).
    """
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before
