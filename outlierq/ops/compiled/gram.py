"""Sums of x x^T over inputs of bfloat16, compiled for processors that multiply such numbers: native/gram.c."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from outlierq.core.machine.threads import each_alone
from outlierq.ops.compiled.rounding import fresh, library

PANEL = 64
# Tokens that are added at a time. Their part of a panel, 64 KiB, stays in the cache.
TOKENS = 512


@cache
def _compiled() -> ctypes.CDLL | None:
    """The library, where the processor has the instructions, and it gives what float64 gives on a small case."""
    compiled = library()
    if compiled is None or not hasattr(compiled, "outlierq_add_gram") or not compiled.outlierq_adds_grams():
        return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    compiled.outlierq_gram_panels.argtypes = (pointer, size, size, pointer)
    compiled.outlierq_add_gram.argtypes = (pointer, size, size, size, pointer)
    rows = torch.randn(9, 150, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, expected = torch.zeros(150, 150), rows.double().T @ rows.double()
    _add(compiled, found, rows)
    return compiled if torch.allclose(found.triu().double(), expected.triu(), atol=1e-4) else None


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> bool:
    """Add rows^T rows to the upper half of `total` [K, K] float32, or False where there is nothing for this.

    rows: [N, K] bfloat16. Each number is a sum over 512 tokens at a time, two by two in their order, which is added to
    the total; the number of threads has no say in it.
    """
    fits = rows.dtype == torch.bfloat16 and rows.device.type == total.device.type == "cpu"
    compiled = _compiled() if fits and total.is_contiguous() and not torch.cpu._is_amx_tile_supported() else None
    if compiled is None:
        return False
    for some in rows.split(TOKENS):
        _add(compiled, total, some.contiguous())
    return True


def _add(compiled: ctypes.CDLL, total: torch.Tensor, rows: torch.Tensor) -> None:
    """The same for up to 512 tokens."""
    (tokens, columns), pairs = rows.shape, -(-len(rows) // 2)
    count = -(-columns // PANEL)
    panels = fresh(count, pairs, PANEL, dtype=torch.int32)
    compiled.outlierq_gram_panels(rows.data_ptr(), tokens, columns, panels.data_ptr())

    def add(panel: int) -> None:
        compiled.outlierq_add_gram(panels.data_ptr(), pairs, columns, panel, total.data_ptr())

    with each_alone() as together:
        together(add, range(count))
