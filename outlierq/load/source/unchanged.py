"""Notices weight files that another program writes to, replaces or removes while a run reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

Stamp = tuple[int, int, int]  # inode, bytes, time of the last change in nanoseconds


def stamps_of(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """What tells a file from a changed one without reading it."""
    return {path: _stamp(path) for path in paths}


def check_unchanged(checkpoint: Checkpoint) -> None:
    """SourceError when a weight file is no longer the one that was opened; files without a stamp are not checked.

    A write within one tick of the file system's clock (milliseconds) after opening is not noticed.
    """
    for path, stamp in checkpoint.stamps.items():
        if _stamp(path) != stamp:
            raise SourceError(
                f"{path} was changed while it was read",
                hint="wait for the program that writes there and run the same command again; add --restart to compress "
                "what is there now",
            )


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(
            f"{path} is gone while it was read: {error.strerror or error}",
            hint="put it back and run the same command again; it continues where it stopped",
        ) from error
    return status.st_ino, status.st_size, status.st_mtime_ns
