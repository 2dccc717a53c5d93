"""Reads weights into the system's file cache while something else keeps the disk idle, such as importing libraries."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.machine.threads import check_room

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

PIECE = 1 << 24


@contextmanager
def reading_ahead(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside the block, read the checkpoint's `weight_files` in the background.

    `posix_fadvise(WILLNEED)` would be shorter, but Linux takes it for the first megabytes of a file only.
    """
    if not checkpoint.weight_files or not _has_room():
        yield
        return
    stop = threading.Event()
    reader = threading.Thread(target=_read, args=(checkpoint.weight_files, stop), name="read-ahead", daemon=True)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def _has_room() -> bool:
    """Whether a thread can start; reading ahead is worth no failure."""
    try:
        check_room(1, PIECE)
    except MemoryError:
        return False
    return True


def _read(paths: Iterable[Path], stop: threading.Event) -> None:
    """Read file after file until told to stop."""
    buffer = bytearray(PIECE)
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                while not stop.is_set() and file.readinto(buffer):
                    pass
        except OSError:
            return  # whoever needs the bytes will read them again, and report it
        if stop.is_set():
            return
