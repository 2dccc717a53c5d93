"""Threads, started only where there is room for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from threading import Thread

# Address space of a thread: its stack (8 MiB by default), and some for what it holds.
THREAD_BYTES = 9 << 20
# What starting needs beside it: with 1 MiB to spare every tenth thread was waited for in vain.
SPARE_BYTES = 16 << 20


def pool(count: int, name: str = "", initializer: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """So many threads. MemoryError when there is no room for them. initializer: each runs it first."""
    check_room(count)
    return ThreadPoolExecutor(count, name, initializer)


def check_room(count: int, more: int = 0) -> None:
    """MemoryError when there is no room for so many threads. more: bytes that each of them takes at once.

    In Python 3.11 a thread that finds no memory while it starts leaves the one that started it waiting for ever.
    """
    size = count * (THREAD_BYTES + more) + SPARE_BYTES
    try:
        mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS).close()  # asked for and given back; no page is touched
    except OSError as error:
        raise MemoryError(f"no room for {count} more threads: {error.strerror}") from error


def end(thread: Thread) -> None:
    """Let a thread end at the next step of its Python code, by raising SystemExit in it; what runs in C is not cut off.

    One that nobody waits for any longer would take a core, and every other thread's turns, until the process ends.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Gives torch's number of threads, and restores it: threads that work side by side use one each."""
    import torch

    count = torch.get_num_threads()
    try:
        yield count
    finally:
        torch.set_num_threads(count)


def single_threaded() -> None:
    """The calling thread computes alone (OpenMP keeps this number by thread)."""
    import torch

    torch.set_num_threads(1)


Together = Callable[[Callable[[int], None], Iterable[int]], None]


@contextmanager
def each_alone(*, on_cpu: bool = True) -> Iterator[Together]:
    """Gives a function that calls another for each number, in as many threads as torch has, each call in one thread.

    What a call computes then does not depend on how many threads there are, as it may where torch or its libraries
    divide a sum among them. on_cpu: False calls one after the other, and leaves torch as it is.
    """
    if not on_cpu:
        yield _one_by_one
        return
    with one_thread_each() as count:
        single_threaded()
        if count == 1:
            yield _one_by_one
            return
        with pool(count, "solving", single_threaded) as threads:
            yield lambda call, numbers: _wait(threads, call, numbers)


def _one_by_one(call: Callable[[int], None], numbers: Iterable[int]) -> None:
    for number in numbers:
        call(number)


def _wait(threads: ThreadPoolExecutor, call: Callable[[int], None], numbers: Iterable[int]) -> None:
    """All calls, side by side; the first error is raised when those that had begun are done."""
    calls = [threads.submit(copy_context().run, call, number) for number in numbers]
    try:
        for each in calls:
            each.result()
    finally:
        for each in calls:
            each.cancel()
