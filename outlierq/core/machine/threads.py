"""Threads, started only where there is room for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Address space of a thread: its stack (8 MiB by default), and some for what it holds.
THREAD_BYTES = 9 << 20


def pool(count: int, name: str = "", initializer: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """So many threads. MemoryError when there is no room for them. initializer: each runs it first."""
    check_room(count)
    return ThreadPoolExecutor(count, name, initializer)


def check_room(count: int, more: int = 0) -> None:
    """MemoryError when there is no room for so many threads. more: bytes that each of them takes at once.

    In Python 3.11 a thread that finds no memory while it starts leaves the one that started it waiting for ever.
    """
    bytearray(count * (THREAD_BYTES + more))  # asked for and given back; its pages are never touched
