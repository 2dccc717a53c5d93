"""Memory of this process: what it holds, and when what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import resource
import sys

# Parameters of mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Give freed heap pages back to the system, where the C library can (glibc).

    Without it the heap fragments and resident memory grows with every block: 4.5 MB a block on SmolLM2-135M.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def return_memory_at_once(least: int = 128 << 10) -> None:
    """Let what is freed go back to the system at once from `least` bytes on, where the C library can be told (glibc).

    glibc raises that size by itself, up to 32 MiB, and then keeps what is freed for later: of a large matrix between
    two small ones that are in use nothing is given back, and how much stays differs from block to block.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, least)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * least)


def keep_freed_memory() -> None:
    """Let freed heap pages stay with this process, where the C library can be told (glibc): the opposite.

    For work on pieces of one size, which needs no more memory for it. Otherwise the system clears pages anew for every
    piece: twice the page faults in a data-free run.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
