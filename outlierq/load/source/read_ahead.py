"""Brings weights into the system's file cache before they are needed, while something else keeps the disk idle:
importing libraries, or working on the weights before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from outlierq.core.machine.threads import check_room

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# Linux takes no more of a wish at once than the device reads ahead, 128 KiB unless it is told otherwise.
WISH = 1 << 17
# Bytes that are asked for before they are needed: by whom works on the bytes before,
AHEAD = 1 << 25
# and while libraries are imported, whose own reading queues behind it (seconds, with 32 MiB).
POLITELY = 1 << 21


def will_need(file: BinaryIO, start: int, nbytes: int) -> None:
    """Let the system fetch bytes of a file without waiting for them, where it can; reading is right without it."""
    if not isinstance(file, FileIO) or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # of a file system that takes no wishes
        for first in range(start, start + nbytes, WISH):
            os.posix_fadvise(file.fileno(), first, min(WISH, start + nbytes - first), os.POSIX_FADV_WILLNEED)


@contextmanager
def reading_ahead(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside the block, bring the checkpoint's `weight_files` into the file cache, in the background."""
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
        check_room(1)
    except MemoryError:
        return False
    return True


def _read(paths: Iterable[Path], stop: threading.Event) -> None:
    """Fetch file after file until told to stop."""
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                for start in range(0, os.fstat(file.fileno()).st_size, POLITELY):
                    if stop.is_set():
                        return
                    will_need(file, start, POLITELY)
                    file.seek(start)
                    file.read(1)  # waits until it is there, so that wishes do not pile up
        except OSError:
            return  # whoever needs the bytes will read them again, and report it
