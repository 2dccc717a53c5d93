"""Threads for waiting on the network and on disks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

# Address space of a thread: its stack (8 MiB by default), and some for what it holds.
THREAD_BYTES = 9 << 20


def pool(count: int) -> ThreadPoolExecutor:
    """So many threads. MemoryError when there is no room for them."""
    check_room(count)
    return ThreadPoolExecutor(count)


def check_room(count: int) -> None:
    """MemoryError when there is no room for so many threads.

    In Python 3.11 a thread that finds no memory while it starts leaves the one that started it waiting for ever.
    """
    bytearray(count * THREAD_BYTES)  # asked for and given back; its pages are never touched
