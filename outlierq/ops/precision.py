"""In which precision float32 matrix products take their operands.

A processor with instructions for bfloat16 takes such operands about twice as fast (AVX-512) or more (AMX). Sums are in
float32 inside of a product, and its result is rounded to bfloat16 here, because torch has no other on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Below this width products are too small a part of the work to be worth a last bit.
LEAST_WIDTH = 1024


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


def takes_bfloat16(width: int, device: torch.device) -> bool:
    """Whether products with a matrix [width, width] take bfloat16 operands: wide ones, where the processor has them.

    What the processor says of itself decides, not a measurement, so that the same machine always gives the same bits.
    """
    return device.type == "cpu" and width >= LEAST_WIDTH and has_bfloat16()


@cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Operand:
    """A float32 matrix that is the second operand of products, which may take it in bfloat16.

    It is read as it was when it was last `renewed`. halves: [k, n], or None for float32.
    """

    def __init__(self, values: torch.Tensor, width: int):
        self.values = values
        short = takes_bfloat16(width, values.device)
        self.halves = torch.empty_like(values, dtype=torch.bfloat16) if short else None

    def renew(self, rows: slice) -> None:
        """Read some rows again."""
        if self.halves is not None:
            self.halves[rows] = self.values[rows]

    def times(self, left: torch.Tensor, rows: slice) -> torch.Tensor:
        """left [m, k] @ some k rows of this, float32 [m, n]."""
        if self.halves is None:
            return left @ self.values[rows]
        return (left.bfloat16() @ self.halves[rows]).float()
