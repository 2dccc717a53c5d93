"""Weights in huge pages: a product streams through its weight, and small pages cost it a fifth of its time on the CPU.

The kernel is asked to gather what is already in memory (Linux 6.1, `MADV_COLLAPSE`), so nothing grows. Where it cannot,
for lack of room or of the feature, nothing changes but the speed.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

PAGE = 2 << 20
COLLAPSE = 25  # MADV_COLLAPSE of linux/mman.h


def gather(tensor: torch.Tensor) -> int:
    """Bytes of this CPU tensor, of any shape, that lie in huge pages now; 0 where there are none."""
    if tensor.device.type != "cpu" or tensor.nbytes < PAGE or not sys.platform.startswith("linux"):
        return 0
    start = torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr()
    first, end = -(-start // PAGE) * PAGE, (start + tensor.nbytes) // PAGE * PAGE
    return end - first if end > first and _advise()(first, end - first, COLLAPSE) == 0 else 0


@cache
def _advise() -> ctypes._FuncPointer:
    """`madvise` of the C library."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
