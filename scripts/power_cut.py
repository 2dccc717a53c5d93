"""A disk that fails: it counts the operations below a folder and, at the n-th, dies, loses power or reports an error.

What is there after a power cut: of a file, the bytes of its last fsync, and of the sectors written since then each one
or not; of a folder, its entries as of its last fsync or of any later moment. Nothing is promised between two files or
two folders: that is less than ext4 or XFS keep. Operations of Python are seen; what native code writes (a saved
safetensors file) is seen at the next one of those, and counts as written only.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

CUT = 77  # exit code of a process whose power was cut
SECTOR = 512
BY_HANDLE = ("pwrite", "fdatasync", "fsync", "posix_fallocate", "ftruncate")
BY_PATH = ("truncate", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")
SYNCS = ("fdatasync", "fsync")

Listing = dict[str, tuple[int, bool]]  # name -> (inode, whether it is a folder)


class Disk:
    """Everything below `root`. Call `install` in a forked child: it replaces functions of `os` and `open` for good.

    at: the operation to act at, counted from 1; None only counts. act: what happens then; the operation itself is
    carried out before it, carried out in part, or not at all, by chance. `act` may raise: then it is not carried out.
    """

    def __init__(
        self, root: Path, at: int | None = None, act: Callable[[Disk, str], None] | None = None, seed: int = 0
    ):
        self.root, self.at, self.act, self.random = root.resolve(), at, act, Random(seed)
        self.count = 0
        self.again = False  # whether `act` is called at every later operation, too
        self.lock = threading.RLock()
        self.held: dict[int, int] = {}  # inode -> a handle, so that no inode is used twice and removed files are kept
        self.synced: dict[int, bytes] = {}
        self.listings: dict[int, list[Listing]] = {}  # of a folder: at its last fsync, and at every change since then

    def install(self) -> Disk:
        """From now on this process works on this disk; what is there now is safe."""
        self._look(durable=True)
        for name in BY_HANDLE + BY_PATH:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        os.open = self._wrapped("open", os.open)
        builtins.open = io.open = self._wrapped("open", builtins.open)
        return self

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if not self._is_mine(name, args, kwargs):
                return original(*args, **kwargs)
            with self.lock:
                self.count += 1
                if self.act and (self.count == self.at or (self.again and self.count > self.at)):
                    self._partly(name, original, args, kwargs)
                done = original(*args, **kwargs)
                self._note(name, args)
                return done

        return operation

    def _partly(self, name: str, original: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        """Carry the operation out, in part or not at all, and act."""
        if self.act in (kill, cut_power) and self.random.random() < 0.5:
            if name == "pwrite":
                handle, data, offset = args
                original(handle, bytes(data)[: self.random.randrange(len(data) + 1)], offset)
            else:
                original(*args, **kwargs)
                self._note(name, args)
        self.act(self, name)

    def _is_mine(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether the operation changes something below the root."""
        if name in BY_HANDLE:
            return self._below(f"/proc/self/fd/{args[0]}")
        if name == "open":
            if isinstance(args[0], int):
                return False
            how = args[1] if len(args) > 1 else kwargs.get("mode", kwargs.get("flags", "r"))
            writes = how & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) if isinstance(how, int) else set(how) & set("wax+")
            return bool(writes) and self._below(args[0])
        folder = kwargs.get("dir_fd")
        return self._below(args[0] if folder is None else f"/proc/self/fd/{folder}")

    def _below(self, path: Any) -> bool:
        text = os.fspath(path)
        text = os.readlink(text) if text.startswith("/proc/self/fd/") else os.path.abspath(text)
        return Path(text).is_relative_to(self.root)

    def _note(self, name: str, args: tuple) -> None:
        """Remember what a cut from now on would leave."""
        self._look()
        if name in SYNCS:
            inode = os.fstat(args[0]).st_ino
            if inode in self.listings:
                self.listings[inode] = self.listings[inode][-1:]
            elif inode in self.held:
                self.synced[inode] = self._content(inode)

    def _look(self, durable: bool = False) -> None:
        """Note new files, and new entries of folders."""
        if self.act is not cut_power:
            return
        folders = [self.root]
        while folders:
            folder = folders.pop()
            listing: Listing = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    listing[entry.name] = entry.inode(), entry.is_dir(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    self._hold(entry.inode(), entry.path, durable)
            inode = folder.stat().st_ino
            self._hold(inode, folder, False)
            known = self.listings.setdefault(inode, [listing])
            if known[-1] != listing:
                known.append(listing)

    def _hold(self, inode: int, path: Any, durable: bool) -> None:
        if inode not in self.held:
            self.held[inode] = OPEN(path, os.O_RDONLY)
            if durable and not Path(path).is_dir():
                self.synced[inode] = self._content(inode)

    def _content(self, inode: int) -> bytes:
        handle = self.held[inode]
        return os.pread(handle, os.fstat(handle).st_size, 0)

    def leave(self, target: Path) -> None:
        """Write what is there after a cut at this moment as the new folder `target`."""
        self._look()
        self._leave_folder(self.root.stat().st_ino, target)

    def _leave_folder(self, inode: int, target: Path) -> None:
        MKDIR(target)
        for name, (entry, is_folder) in self.random.choice(self.listings[inode]).items():
            if is_folder:
                self._leave_folder(entry, target / name)
            else:
                handle = OPEN(target / name, os.O_WRONLY | os.O_CREAT, 0o644)
                PWRITE(handle, self._after_cut(entry), 0)
                os.close(handle)

    def _after_cut(self, inode: int) -> bytes:
        """Old bytes, new ones, or some sectors of each; what was never written is zero."""
        old, new = self.synced.get(inode, b""), self._content(inode)
        draw = self.random.random()
        if old == new or draw < 0.3:
            return old
        if draw < 0.6:
            return new
        size = self.random.choice((len(old), len(new)))
        sectors = (self.random.choice((old, new))[at : at + SECTOR] for at in range(0, size, SECTOR))
        return b"".join(sector.ljust(SECTOR, b"\0") for sector in sectors)[:size]


OPEN, MKDIR, PWRITE = os.open, os.mkdir, os.pwrite


def kill(_disk: Disk, _name: str) -> None:
    """SIGKILL: what was written stays."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut_power(disk: Disk, _name: str) -> None:
    """The process ends, and beside the root lies what a power cut would have left of it."""
    disk.leave(disk.root.with_name(disk.root.name + ".cut"))
    os._exit(CUT)


def failing(number: int, *, names: tuple[str, ...] = (), lasting: bool = False) -> Callable[[Disk, str], None]:
    """An action: the operation fails with this errno. names: only these operations. lasting: so do all later ones."""

    def fail(disk: Disk, name: str) -> None:
        disk.again = True
        if not names or name in names:
            disk.again = lasting
            raise OSError(number, os.strerror(number))

    return fail
