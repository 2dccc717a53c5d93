"""The work folder of a run: a lock, an identity, and one line for every finished unit of work.

Work happens in `OUT.partial`. Started again with the same source and recipe, a run goes on behind the last line;
with another one it is refused. The folder gets its final name as the very last step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlierq.core.errors import OutputError
from outlierq.export.writer import disk_error
from outlierq.pipeline.plan import REPORT_NAME

# Names with a dot are never carried over from a source, so they cannot meet a file of the result.
JOURNAL = ".journal.jsonl"
LOCK = ".lock"


class Journal:
    """Finished units of one run, in `folder`. entries: unit name -> what was written about it."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self.path = folder / JOURNAL
        self.entries: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._resume(identity)
        else:
            self._append({"identity": identity})

    @property
    def resumed(self) -> bool:
        """Whether an earlier run had finished units."""
        return bool(self.entries)

    def add(self, unit: str, content: dict[str, Any]) -> None:
        """Record a finished unit; it is on the disk when this returns."""
        self._append({"unit": unit, **content})
        self.entries[unit] = content

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self.path, 0) from error

    def _resume(self, identity: dict[str, Any]) -> None:
        """Read the lines; a last line that a crash cut short is dropped."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            former = lines[0]["identity"] if lines else {}
            entries = {line.pop("unit"): line for line in lines[1:]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{self.path} is damaged: {error}", hint="run again with --restart") from error
        wanted = json.loads(json.dumps(identity))
        differing = sorted(key for key in wanted.keys() | former.keys() if former.get(key) != wanted.get(key))
        if differing and entries:
            raise OutputError(
                f"{self.folder} holds an unfinished run with another {' and '.join(differing)} "
                f"({len(entries)} units done)",
                hint="run the former command to finish it, add --restart to throw it away, or choose another folder",
            )
        if differing:
            # Nothing was done yet, so nothing is lost by starting over.
            self.path.unlink()
            self._append({"identity": identity})
        self.entries = entries


def work_folder(out: Path) -> Path:
    """Where the run for `out` works; a sibling, so that the last rename stays on one file system."""
    return out.parent / f"{out.name}.partial"


@contextmanager
def working(out: Path, *, restart: bool = False) -> Iterator[Path]:
    """The locked work folder for `out`; a failure that leaves nothing in it removes it.

    OutputError when the result exists, another process works there, or the folder holds something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists already", hint="choose another output folder, or remove this one; nothing is overwritten"
        )
    work = work_folder(out)
    _refuse_foreign(work)
    with locked(work):
        if restart:
            for path in work.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield work
        finally:
            if work.exists() and [path.name for path in work.iterdir()] == [LOCK]:
                shutil.rmtree(work)


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
        lock = open(folder / LOCK, "w")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise disk_error(error, folder, 0) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another outlierq works in {folder}", hint="wait for it, or choose another -o"
            ) from error
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def finish(work: Path, out: Path, result: Collection[str]) -> None:
    """Remove every file that is not part of the `result` and give the folder its final name."""
    from outlierq.export.writer import publish

    for path in work.iterdir():
        if path.name not in result:
            path.unlink()
    if out.exists():
        out.rmdir()
    publish(work, out)
