"""What is ours in a folder, so that nothing else is written over or removed; files that are there whole or not at all.

A folder that outlierq works in holds a list of the names that it may write there (a journal, a list of statistics, a
list of shards). Only plain files with a name of that list are ever removed. What has no list has a suffix of ours.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

# No program but this one gives files these names.
LOCK = ".outlierq-lock"
PART = ".outlierq-part"
LONGEST_NAME = 255  # bytes; a longer one cannot even be asked for


def foreign(folder: Path, ours: Collection[str]) -> list[str]:
    """Names of what lies in the folder and is not ours: no plain file, or one that `ours` does not name.

    A lock, and what was left half written of a file in `ours`, are ours; so is a folder that holds nothing else, when a
    name of `ours` leads into it.
    """
    if not folder.is_dir():
        return []
    known = {LOCK, *ours, *(f"{name}{PART}" for name in ours)}
    folders = {name.partition("/")[0] for name in ours if "/" in name}
    others = []
    for path in folder.iterdir():
        if path.name in folders and path.is_dir() and not path.is_symlink():
            below = [name.partition("/")[2] for name in ours if name.startswith(f"{path.name}/")]
            others += [f"{path.name}/{name}" for name in foreign(path, below)]
        elif path.name not in known or path.is_symlink() or not path.is_file():
            others.append(path.name)
    return sorted(others)


def is_name_below(name: Any) -> bool:
    """Whether this is the name of a file in a folder, or in a folder of that, which leads nowhere else."""
    if not isinstance(name, str) or "\0" in name:
        return False
    parts = name.split("/")
    is_short = all(len(f"{part}{PART}".encode("utf-8", "surrogatepass")) <= LONGEST_NAME for part in parts)
    return len(parts) <= 2 and is_short and all(part not in ("", ".", "..") for part in parts)


def remove_files(folder: Path, ours: Iterable[str]) -> None:
    """Remove the plain files with these names, whole or half written, in the given order, and folders left empty."""
    for name in filter(is_name_below, ours):
        for path in (folder / f"{name}{PART}", folder / name):
            if path.is_file() and not path.is_symlink() and not path.parent.is_symlink():
                path.unlink()
        if "/" in name and (folder / name).parent.is_dir() and not any((folder / name).parent.iterdir()):
            (folder / name).parent.rmdir()


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there with all its bytes or as it was, also after a power cut. OSError when it cannot be written."""
    part = path.with_name(f"{path.name}{PART}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def sync_names(folder: Path) -> None:
    """Force the names in a folder onto the disk: a power cut leaves them as they are now."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
