"""The work folder of a run, `OUT.partial`: locked while somebody works there, renamed as the very last step."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outlierq.core.errors import OutputError
from outlierq.core.report import REPORT_NAME
from outlierq.export.writer import disk_error, sync_folder

# Names with a dot are never carried over from a source, so they cannot meet a file of the result.
JOURNAL = ".journal.jsonl"


LOCK = ".lock"


def work_folder(out: Path) -> Path:
    """Where the run for `out` works; a sibling, so that the last rename stays on one file system."""
    return out.parent / f"{out.name}.partial"


@contextmanager
def working(out: Path, *, restart: bool = False) -> Iterator[Path]:
    """The locked work folder for `out`; a failure that leaves nothing in it removes it.

    OutputError when the result exists, another process works there, or the folder holds something else.
    """
    refuse_existing(out)
    work = work_folder(out)
    _refuse_foreign(work)
    with locked(work):
        if restart:
            _clear(work, kept=())
        try:
            yield work
        finally:
            # Tidying up only; on a disk that is gone the error that is on its way says more.
            with suppress(OSError):
                if [path.name for path in work.iterdir()] == [LOCK]:
                    shutil.rmtree(work)


def refuse_existing(out: Path) -> None:
    """OutputError when there is a result already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists already", hint="choose another output folder, or remove this one; nothing is overwritten"
        )


def _clear(work: Path, kept: Collection[str]) -> None:
    """Remove everything else from a work folder. What shows that the rest is ours goes last: `_refuse_foreign`."""
    signs = [name for name in (REPORT_NAME, JOURNAL) if name not in kept]
    others = (path for path in work.iterdir() if path.name not in (*kept, LOCK, *signs))
    for path in (*others, *(work / name for name in signs)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_foreign(work: Path) -> None:
    """OutputError when the work folder holds something, but no run of ours."""
    held = sorted(path.name for path in work.iterdir() if path.name != LOCK) if work.is_dir() else []
    # Without a journal it is ours only when a run was cut off while it put its finished result in place.
    if held and JOURNAL not in held and REPORT_NAME not in held:
        raise OutputError(
            f"{work} is in the way: it holds {held[0]} and no run of outlierq", hint="move it, or choose another -o"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other processes out of it; OutputError when one is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)  # else a power cut may take the folder with all that is safe in it
        lock = open(folder / LOCK, "w")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise disk_error(error, folder, 0) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended just now has removed the file: then the lock is on a file that nobody else will find.
            is_held = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
        except OSError:
            is_held = False
        if not is_held:
            raise OutputError(f"another outlierq works in {folder}", hint="wait for it, or choose another -o")
        try:
            yield
        finally:
            # On a disk that is gone the error that is on its way says more.
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)


def finish(work: Path, out: Path, result: Collection[str]) -> None:
    """Remove every file that is not part of the `result` and give the folder its final name."""
    from outlierq.export.writer import publish

    try:
        _clear(work, kept=result)
        (work / LOCK).unlink(missing_ok=True)
        if out.exists():
            out.rmdir()
        publish(work, out)
    except OSError as error:
        raise disk_error(error, out, 0) from error
