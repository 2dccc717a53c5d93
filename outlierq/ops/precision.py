"""In which precision float32 matrix products take their operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_operands(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 matrix products on a CPU may round their operands to `dtype`; sums stay float32.

    bfloat16 is several times faster on a CPU with matrix units, and exact for values that came as bfloat16. Any other
    dtype means full float32. On a GPU, TF32 is off either way: it would cut operands to 10 bits. Settings are restored.
    """
    # torch makes this attribute when it runs, so that a type checker does not see it.
    cpu, gpu = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision, gpu.fp32_precision
    try:
        cpu.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
        gpu.fp32_precision = "ieee"
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before
