"""The work folder of a run: a lock, an identity, and one line for every finished unit of work.

Work happens in `OUT.partial`. Started again with the same source and recipe, a run goes on behind the last line;
with another one it is refused. The folder gets its final name as the very last step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlierq.core.errors import OutputError
from outlierq.export.writer import disk_error

JOURNAL = "journal.jsonl"
LOCK = "lock"
# Files of the work folder that are not part of the result.
INTERNAL = (JOURNAL, LOCK, "hidden.safetensors")


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
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return self._append({"identity": identity})
        known = json.loads(json.dumps(identity))
        differing = [key for key, value in known.items() if lines[0]["identity"].get(key) != value]
        if differing:
            raise OutputError(
                f"{self.folder} holds an unfinished run with another {' and '.join(differing)} "
                f"({len(lines) - 1} units done)",
                hint="run the former command to finish it, add --restart to throw it away, or choose another folder",
            )
        for line in lines[1:]:
            self.entries[line.pop("unit")] = line
        return None


def work_folder(out: Path) -> Path:
    """Where the run for `out` works; a sibling, so that the last rename stays on one file system."""
    return out.parent / f"{out.name}.partial"


@contextmanager
def working(out: Path, *, restart: bool = False) -> Iterator[Path]:
    """The locked work folder for `out`. OutputError when the result exists, or another process works there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out} exists already", hint="choose another output folder, or remove this one; nothing is overwritten"
        )
    work = work_folder(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / LOCK, "w")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise disk_error(error, work, 0) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another outlierq works in {work}", hint="wait for it, or choose another -o") from error
        if restart:
            for path in work.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield work


def finish(work: Path, out: Path) -> None:
    """Remove what is not part of the result and give the folder its final name."""
    from outlierq.export.writer import publish

    for name in INTERNAL:
        (work / name).unlink(missing_ok=True)
    if out.exists():
        out.rmdir()
    publish(work, out)
