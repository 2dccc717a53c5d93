"""Notices weight files that another program writes to, replaces or removes while a run reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

DIGITS = 15  # of a digest, 60 bits: as many as a number in JSON may have anywhere
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


def lasting_stamps(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The same by file name, for a run that goes on later; with the time of the last change of any kind in it.

    That one cannot be set back, as the other can by whoever copies a file. Of files that do not lie here it is their
    digest, as a number.
    """
    statuses = {path: path.stat() for path in checkpoint.stamps}
    here = {p.name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in statuses.items()}
    return here | {name: [int(digest[:DIGITS], 16)] for name, digest in checkpoint.digests.items()}


def differing(checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[str]:
    """Names of the tensors whose bytes are not those that were read before. digests: as `Checkpoint.bytes_read`."""
    return [name for name, digest in digests.items() if checkpoint.digest(name) != digest]


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(
            f"{path} is gone while it was read: {error.strerror or error}",
            hint="put it back and run the same command again; it continues where it stopped",
        ) from error
    return status.st_ino, status.st_size, status.st_mtime_ns
