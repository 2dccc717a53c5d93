"""Whether a file from the Hub holds the bytes that the Hub names it by: found out once for every file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from outlierq.core.errors import SourceError
from outlierq.core.machine.cache_folder import cache_folder
from outlierq.core.machine.threads import pool

SHA256_DIGITS, SHA1_DIGITS = 64, 40
MOST_THREADS = 8


def check_content(path: Path, digest: str, name: str, hint: str) -> None:
    """SourceError, with both digests, unless the file's bytes have this one.

    digest: the sha256 of a file in large storage (LFS, Xet), or the blob id of one that git itself holds, as hex.
    """
    actual = _digest(path, digest)
    if actual != digest:
        kind = "sha256" if len(digest) == SHA256_DIGITS else "git blob id"
        size = path.stat().st_size
        raise SourceError(
            f"{name} is damaged: its {kind} is {actual}, the Hub's is {digest} ({size:,} bytes at {path})", hint=hint
        )


def check_cached(paths: Iterable[Path]) -> None:
    """Check files of a Hub cache that were not checked before; SourceError names the first damaged one.

    A file in a snapshot is a link to a blob, which is named after its content. What was found sound is not read again
    as long as its inode, size and time stay the same. A copy that is no such link has no name to hold it against.
    """
    blobs = [(path.name, path.resolve()) for path in paths]
    waiting = [(name, blob) for name, blob in blobs if _is_digest(blob.name) and not _known(blob)]
    with pool(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(_check_blob, waiting):
            pass


def _check_blob(file: tuple[str, Path]) -> None:
    """Check one blob, and remember that it is sound."""
    name, blob = file
    stamp = _stamp(blob)
    check_content(blob, blob.name, name, hint=f"remove {blob} and run the same command again; it is then fetched anew")
    # Where nothing can be kept, the next run reads the file once more.
    with suppress(OSError):
        place = _place(blob)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")
        part.write_text(stamp)
        part.replace(place)


def _digest(path: Path, listed: str) -> str:
    """The digest of the file, of the kind of `listed`."""
    with path.open("rb") as file:
        if len(listed) == SHA256_DIGITS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        whole = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: whole).hexdigest()


def _is_digest(name: str) -> bool:
    """Whether a blob is called by its digest."""
    return len(name) in (SHA256_DIGITS, SHA1_DIGITS) and not name.strip("0123456789abcdef")


def _known(blob: Path) -> bool:
    """Whether these bytes were checked before, and the file has not been touched since."""
    try:
        return _place(blob).read_text() == _stamp(blob)
    except (OSError, ValueError):  # bytes that are no text are no note of ours
        return False


def _place(blob: Path) -> Path:
    return cache_folder() / "checked" / blob.name


def _stamp(blob: Path) -> str:
    """What tells a file from a changed one without reading it."""
    status = blob.stat()
    return f"{blob} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
