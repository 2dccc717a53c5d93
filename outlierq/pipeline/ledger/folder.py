"""The work folder of a run, `OUT.partial`: locked while somebody works there, renamed as the very last step."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outlierq.core.errors import OutputError
from outlierq.core.machine.own_files import LOCK, foreign, remove_files
from outlierq.export.writer import disk_error, sync_folder
from outlierq.pipeline.ledger.journal import JOURNAL, listed_files


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
            _clear(work, but=())
        try:
            yield work
        finally:
            # Tidying up only; on a disk that is gone the error that is on its way says more.
            with suppress(OSError):
                if [path.name for path in work.iterdir()] == [LOCK]:
                    (work / LOCK).unlink()
                    work.rmdir()


def refuse_existing(out: Path) -> None:
    """OutputError when there is a result already, or no folder can be put there in one step."""
    if out.is_symlink():
        raise OutputError(f"{out} is a link to {os.readlink(out)}", hint="name the folder itself, or another one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists already", hint="choose another output folder, or remove this one; nothing is overwritten"
        )
    if out.exists() and (out.resolve() == Path.cwd() or os.path.ismount(out)):
        kind = "a mount point" if os.path.ismount(out) else "the folder you are in"
        raise OutputError(
            f"{out} is {kind}, which cannot be replaced by the result", hint=f"name a new folder, such as {out}/NAME"
        )


def _clear(work: Path, but: Collection[str]) -> None:
    """Remove what the journal lists, with a few exceptions. The journal shows that the rest is ours: it goes last."""
    names = sorted(listed_files(work) - {*but, JOURNAL})
    remove_files(work, [*names, *({JOURNAL} - {*but})])


def _refuse_foreign(work: Path) -> None:
    """OutputError when the work folder is no folder, or holds something that no run of ours lists as its own."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise OutputError(f"{work} is in the way: it is no folder of ours", hint="move it, or choose another -o")
    others = foreign(work, listed_files(work) | {JOURNAL})
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise OutputError(
            f"{work} is in the way: it holds {others[0]}{more}, which this program did not put there",
            hint="move what is yours out of it, or choose another -o",
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep other processes out of it; OutputError when one is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)  # else a power cut may take the folder with all that is safe in it
        lock = open(folder / LOCK, "a")  # noqa: SIM115 - held for the whole run
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
    """Remove every file of the run that is not part of the `result`, and give the folder its final name."""
    from outlierq.export.writer import publish

    try:
        _clear(work, but={*result, JOURNAL})
        (work / LOCK).unlink(missing_ok=True)
        if out.exists():
            out.rmdir()
        publish(work, out)
        # Until now it showed whose folder this is.
        (out / JOURNAL).unlink()
    except OSError as error:
        raise disk_error(error, out, 0) from error
