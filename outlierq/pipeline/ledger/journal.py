"""The work folder of a run: a lock, an identity, and one line for every finished unit of work.

Work happens in `OUT.partial`. Started again with the same source and recipe, a run goes on behind the last line;
with another one it is refused. The folder gets its final name as the very last step.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.machine.own_files import is_name_below, remove_files
from outlierq.core.machine.printable import whole_characters
from outlierq.core.machine.untrusted import brief, checked, json_object
from outlierq.core.report import SiteRow
from outlierq.export.writer import disk_error
from outlierq.load import differing, lasting_stamps

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# No program but this one gives a file this name, and names with a dot are never carried over from a source.
JOURNAL = ".outlierq-journal.jsonl"

# Bytes; the longest first lines list some thousand files.
LONGEST_LINE = 100_000_000

# What the line of a finished unit must hold beside its name.
UNIT_KEYS = ("xxh3_128", "rows", "transforms", "notes")


class Journal:
    """Finished units of one run, in `folder`. entries: unit name -> what was written about it.

    identity: what must be equal for a run to go on. about: what a reader of an unfinished run wants to know, by name.
    read: digests of the source's tensors that were read so far, as `Checkpoint.bytes_read`. stamps: `lasting_stamps` of
    its files when they were looked at last. files: every name that the run may write in the folder; only what a journal
    lists is ever removed. spent: gives wall seconds by stage since it was asked last; each line carries them. seconds:
    what earlier processes spent on this run; a killed one takes the time since its last line with it.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        spent: Callable[[], Mapping[str, float]] = dict,
        about: Mapping[str, Any] = MappingProxyType({}),
        files: Collection[str] = (),
        stamps: Mapping[str, list[int]] = MappingProxyType({}),
    ):
        self.folder, self._spent = folder, spent
        known = {"files": sorted(files), "stamps": dict(stamps)}
        self._first_line: dict[str, Any] = {"identity": identity, "about": dict(about), **known}
        self.path = folder / JOURNAL
        self.entries: dict[str, dict[str, Any]] = {}
        self.read: dict[str, str] = {}
        self.stamps = dict(stamps)
        self.seconds: Counter[str] = Counter()
        if self.path.exists():
            self._resume(identity)
        else:
            self._append(self._first_line)

    @property
    def resumed(self) -> bool:
        """Whether an earlier run had finished units."""
        return bool(self.entries)

    @property
    def rows(self) -> tuple[SiteRow, ...]:
        """The report's rows of all finished units; OutputError when one is damaged."""
        rows = (row for entry in self.entries.values() for row in entry["rows"])
        return tuple(checked(SiteRow, row, f"row of a site in {self.path}", OutputError) for row in rows)

    def add(self, unit: str, content: dict[str, Any]) -> None:
        """Record a finished unit; it is on the disk when this returns."""
        self._append({"unit": unit, **content, "seconds": dict(self._spent())})
        self.entries[unit] = content
        self.read |= content.get("read", {})

    def check_source(self, checkpoint: Checkpoint) -> None:
        """OutputError when the source's files have changed since, and a tensor in them that was read has other bytes.

        Files that were copied, or put in their place again, are read once more; unchanged ones are not.
        """
        now = lasting_stamps(checkpoint)
        if now == self.stamps:
            return
        changed = differing(checkpoint, self.read)
        if changed:
            more = f" and {len(changed) - 1} more" if changed[1:] else ""
            raise OutputError(
                f"{self.folder} holds an unfinished run ({len(self.entries)} units done) of other weights: {changed[0]}"
                f"{more} of {checkpoint.source} had other bytes",
                hint="put the former files back to finish it, or add --restart to compress what is there now",
            )
        self.stamps = now
        self._append({"stamps": now})

    @contextmanager
    def told_of_stops(self) -> Iterator[None]:
        """When the run ends early, record the time that was spent on a unit that did not come to its end."""
        try:
            yield
        except BaseException:  # an interrupt, too
            # Not on a disk that is full or gone: then why the run ended is worth more than its seconds.
            with suppress(OutputError):
                self._append({"seconds": dict(self._spent())})
            raise

    def _append(self, line: dict[str, Any]) -> None:
        """All of the line or nothing of it: a part would stand in the way of the next."""
        try:
            with open(self.path, "ab") as file:
                whole = os.fstat(file.fileno()).st_size
                try:
                    file.write((json.dumps(whole_characters(line)) + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), whole)
                    raise
        except OSError as error:
            raise disk_error(error, self.path, 0) from error

    def _resume(self, identity: dict[str, Any]) -> None:
        """Read the lines; what a crash cut short is dropped."""
        lines, length = read_lines(self.path)
        _cut(self.path, length)
        try:
            former = lines[0]["identity"] if lines else {}
            self.seconds = seconds_of(lines)
            for line in lines:
                self.stamps = line.get("stamps", self.stamps)
                self.read |= line.get("read", {})
            units = [line for line in lines[1:] if line.keys() - {"seconds", "stamps"}]
            entries = {line["unit"]: {key: value for key, value in line.items() if key != "unit"} for line in units}
        except (KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{self.path} is damaged: {error}", hint="run again with --restart") from error
        current = json.loads(json.dumps(whole_characters(identity)))
        differing = sorted(key for key in current.keys() | former.keys() if former.get(key) != current.get(key))
        if differing and entries:
            raise OutputError(
                f"{self.folder} holds an unfinished run with another {' and '.join(differing)} "
                f"({len(entries)} units done)",
                hint="run the former command to finish it, add --restart to throw it away, or choose another folder",
            )
        if differing:
            # Nothing was done yet, so nothing is lost by starting over.
            self.seconds.clear()
            self.read.clear()
            self.stamps = self._first_line["stamps"]
            remove_files(self.folder, sorted(listed_files(self.folder)))
            _cut(self.path, 0)
            self._append(self._first_line)
        self.entries = entries


def listed_files(folder: Path) -> frozenset[str]:
    """Names of all files that the unfinished run in a folder lists as its own; none where there is no such run."""
    try:
        with open(folder / JOURNAL, "rb") as file:
            first = json.loads(file.readline(LONGEST_LINE))
        names = first["files"] if isinstance(first["identity"], dict) else ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()
    return frozenset(names) if isinstance(names, list) and all(map(is_name_below, names)) else frozenset()


def former_shards(folder: Path) -> int | None:
    """In how many shards the unfinished run in a folder calibrates; None when there is none, or it has no unit yet."""
    path = folder / JOURNAL
    lines = read_lines(path)[0] if path.exists() else []
    shards = lines[0]["identity"].get("shards", 1) if any("unit" in line for line in lines) else None
    if shards is not None and type(shards) is not int:
        raise OutputError(f"{path} is damaged: {brief(shards)} shards", hint="run again with --restart")
    return shards


def _cut(path: Path, length: int) -> None:
    """Keep the first bytes of a file only."""
    try:
        if path.stat().st_size > length:
            os.truncate(path, length)
    except OSError as error:
        raise disk_error(error, path, 0) from error


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal, and how many bytes they are; a last line that a crash cut short is left out.

    After a power cut it may end as it should and have a hole. OutputError when another line is damaged.
    """
    try:
        raw, length = path.read_bytes(), 0
    except OSError as error:
        raise disk_error(error, path, 0) from error
    lines: list[dict[str, Any]] = []
    for line in raw.splitlines(keepends=True):
        try:
            lines.append(_checked_line(line, path, first=not lines))
        except OutputError:
            if length + len(line) == len(raw):
                break
            raise
        if not line.endswith(b"\n"):
            return lines[:-1], length
        length += len(line)
    return lines, length


def _checked_line(line: bytes, path: Path, *, first: bool) -> dict[str, Any]:
    """The object on one line; OutputError when it does not hold what we write."""
    hint = "run again with --restart"
    value = json_object(line, f"{path} is damaged: a line", OutputError, hint=hint)
    parts = {
        "seconds": dict,
        "rows": list,
        "transforms": list,
        "notes": list,
        "unit": str,
        "read": dict,
        "stamps": dict,
    }
    parts |= {"identity": dict, "about": dict, "files": list} if first else {}
    faults = [name for name, kind in parts.items() if not isinstance(value.get(name, kind()), kind)]
    faults += [name for name in UNIT_KEYS if "unit" in value and name not in value]
    times = value.get("seconds", {})
    if faults or (first and "identity" not in value) or not all(type(v) in (int, float) for v in times.values()):
        raise OutputError(f"{path} is damaged: a line is not one of a run ({brief(value)})", hint=hint)
    return value


def seconds_of(lines: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Wall time by stage that the lines of a journal add up to."""
    seconds: Counter[str] = Counter()
    for line in lines:
        seconds.update(line.get("seconds", {}))
    return seconds
