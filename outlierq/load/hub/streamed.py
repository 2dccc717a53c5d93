"""A checkpoint on the Hub whose weight files come one after another and go again: for models larger than the disk.

Config, tokenizer and index are fetched like any other, headers and the first bytes of every tensor by HTTP ranges. A
shard is fetched and checked when one of its tensors is first read. At most `keep` shards lie here at a time; the one
that was read longest ago makes room. One commit is read from beginning to end, also by a run that is continued.
"""

from __future__ import annotations

import fcntl
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from outlierq.core.errors import SourceError
from outlierq.core.machine.own_files import LOCK, PART, foreign, is_name_below, remove_files, write_atomically
from outlierq.core.machine.threads import pool
from outlierq.core.model import Structure
from outlierq.load.hub.content import check_cached
from outlierq.load.hub.remote import PIECE_BYTES, RemoteFile
from outlierq.load.hub.snapshot import Listing, listing, snapshot
from outlierq.load.source.folder import FolderCheckpoint
from outlierq.load.source.shards import StoredTensor, lookup, open_plain

PIN = ".outlierq-shards.json"
# Requests at a time for headers and first bytes.
MOST_REQUESTS = 16
# Blocks that a data-free run works on at once: more would need more shards, and wait for the network all the same.
MOST_THREADS = 2
# Shards beside those of the blocks that are worked on.
SPARE = 1


def open_streamed(
    repository: str,
    revision: str | None,
    shards: Path | None,
    *,
    trust_remote_code: bool = False,
    restart: bool = False,
) -> StreamedCheckpoint:
    """The checkpoint of a Hub id without its weights, which come through the folder `shards` when they are read.

    A run that was stopped has left its commit in that folder; that one is read then, whatever a branch stands for now,
    unless `restart` is set. shards None: for headers alone. SourceError as `snapshot`.
    """
    pinned = None if shards is None or restart else _pinned(shards, repository, revision)
    listed = listing(repository, pinned or revision)
    folder, _ = snapshot(repository, listed.commit, trust_remote_code=trust_remote_code, weights=False)
    remote = {name: RemoteFile(repository, listed.commit, file) for name, file in listed.weights.items()}
    checkpoint = StreamedCheckpoint(listed, folder, remote)
    if shards is not None:
        checkpoint.store = ShardStore(
            shards, remote, {"repository": repository, "revision": revision, "commit": listed.commit}
        )
    return checkpoint


class StreamedCheckpoint(FolderCheckpoint):
    """A repository at one commit.

    folder: config, tokenizer and whatever else is small. store: where shards come and go; None for headers alone: a
    tensor that is read all the same is fetched by itself, and not checked.
    """

    most_threads = MOST_THREADS

    def __init__(self, listed: Listing, folder: Path, remote: dict[str, RemoteFile]):
        self.store: ShardStore | None = None
        self._listed, self._remote = listed, remote
        self._checked_here: set[Path] = set()
        with pool(MOST_REQUESTS) as threads:
            # A fault of a file that the index does not name is no fault of the model.
            self._headers = {name: threads.submit(file.header) for name, file in remote.items()}
        super().__init__(folder, source=listed.repository, revision=listed.commit)

    @property
    def weight_files(self) -> list[Path]:
        """None of them stays here."""
        return []

    @property
    def digests(self) -> dict[str, str]:
        """Digest of every weight file by name, as the Hub lists it."""
        return {name: file.listed.digest for name, file in sorted(self._remote.items())}

    def make_room(self, structure: Structure, fetching: Callable[[int, int, str], None], *, together: bool) -> None:
        """Let as many shards lie here as the blocks that are worked on at a time can need, and one more."""
        if self.store is not None:
            self.store.fetching = fetching
            spans = [
                {self._stored[name].path for name in block.tensors if name in self._stored}
                for block in structure.blocks
            ]
            self.store.keep = max(map(len, spans), default=1) * (MOST_THREADS if together else 1) + SPARE

    def drop_shards(self) -> None:
        """Remove every shard; one that is read once more all the same is fetched once more."""
        if self.store is not None:
            self.store.clear()

    def _names(self) -> Collection[str]:
        return self._listed.names

    def _header(self, name: str) -> dict[str, StoredTensor]:
        return self._headers[name].result()

    def _open(self, path: Path) -> BinaryIO:
        here = self.path / path.name  # the whole model may have been fetched before
        if here.is_file():
            if here not in self._checked_here:
                check_cached([here])
                self._checked_here.add(here)
            return open_plain(here)
        return RemoteReader(self._remote[path.name]) if self.store is None else self.store.open(path.name)

    def _sample(self, names: list[str], length: int) -> Iterator[tuple[str, bytes]]:
        def first_bytes(name: str) -> tuple[str, bytes]:
            stored = lookup(self._stored, name)
            stop = stored.start + min(stored.info.nbytes, length)
            return name, self._remote[stored.path.name].read(stored.start, stop)

        with pool(MOST_REQUESTS) as threads:
            yield from threads.map(first_bytes, names)


class RemoteReader(RawIOBase):
    """A remote file for reading by position; nothing is kept."""

    def __init__(self, remote: RemoteFile):
        self._remote, self._at = remote, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position, counted from the start."""
        if whence != 0:
            raise ValueError("only positions from the start are known")
        self._at = offset
        return offset

    def readinto(self, target: Any) -> int:
        """Fill the target, or its first megabytes."""
        count = min(len(target), PIECE_BYTES, self._remote.listed.size - self._at)
        target[:count] = self._remote.read(self._at, self._at + count)
        self._at += count
        return count


class ShardStore:
    """Weight files in `folder`, at most `keep` at a time. Several threads may open them; no other process may.

    pin: repository, revision asked for, and commit, so that a continued run reads the same one.
    """

    def __init__(self, folder: Path, remote: dict[str, RemoteFile], pin: dict[str, str | None], keep: int = 3):
        self.folder, self.keep, self._remote = folder, keep, remote
        self._lock, self._locks = Lock(), {name: Lock() for name in remote}
        # Names of what lies here or is under way, in the order of their last use; `_sound`: those that were checked.
        self._held: OrderedDict[str, None] = OrderedDict()
        self._sound: set[str] = set()
        self.fetching: Callable[[int, int, str], None] = lambda done, total, name: None
        self._fetched: set[str] = set()
        _refuse_foreign(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._process_lock = open(folder / LOCK, "a")  # noqa: SIM115 - held until `close`
        except OSError as error:
            raise SourceError(f"{folder} cannot be made: {error.strerror or error}") from error
        try:
            fcntl.flock(self._process_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._process_lock.close()
            raise SourceError(
                f"another outlierq puts its shards into {folder}", hint="wait for it, or choose another -o"
            ) from error
        self._take_up(pin)

    def _take_up(self, pin: dict[str, str | None]) -> None:
        """Keep the shards that a stopped run left, if they are of this commit; others of ours make room."""
        former = _read_pin(self.folder / PIN)
        if former.get("commit") != pin["commit"]:
            remove_files(self.folder, [*_shards_of(former), PIN])
        write_atomically(self.folder / PIN, json.dumps({**pin, "shards": sorted(self._remote)}).encode())
        left = {path.name.removesuffix(PART) for path in self.folder.iterdir()}
        self._held.update(dict.fromkeys(sorted(left & self._remote.keys())))

    def open(self, name: str) -> BinaryIO:
        """The shard, fetched and checked if need be. It can be read to its end even if it has to go meanwhile."""
        with self._locks[name]:
            self._reserve(name)
            if name not in self._sound:
                self._fetch(name)
            return open_plain(self.folder / name)

    def _fetch(self, name: str) -> None:
        """Have a sound file in place; one that an earlier process left is checked, and fetched anew if need be."""
        path = self.folder / name
        self.folder.mkdir(exist_ok=True)
        if path.exists():
            try:
                self._remote[name].check(path)
            except SourceError:
                path.unlink()
        if not path.exists():
            self.fetching(len(self._fetched), len(self._remote), name)
            self._remote[name].fetch(path)
            self._fetched.add(name)
        self._sound.add(name)

    def _reserve(self, name: str) -> None:
        """Count the shard as the one used last, and remove those used longest ago until there is room for it."""
        with self._lock:
            self._held.pop(name, None)
            for old in list(self._held):
                if len(self._held) < self.keep:
                    break
                # One that another thread fetches or opens at this moment stays.
                if self._locks[old].acquire(blocking=False):
                    self._remove(old)
                    self._locks[old].release()
            self._held[name] = None

    def _remove(self, name: str) -> None:
        self._held.pop(name)
        self._sound.discard(name)
        remove_files(self.folder, [name])

    def clear(self) -> None:
        """Remove everything: the work is done. A shard that is read once more all the same is fetched once more."""
        with self._lock:
            self._held.clear()
            self._sound.clear()
            # The work is done; a file that stays is no reason to call it a failure.
            with suppress(OSError):
                remove_files(self.folder, [*sorted(self._remote), PIN, LOCK])
                self.folder.rmdir()

    def close(self) -> None:
        """Let other processes in; shards stay for a run that goes on."""
        if not self._held:
            self.clear()
        self._process_lock.close()


def _refuse_foreign(folder: Path) -> None:
    """SourceError when the folder holds something that no run of ours lists as its own."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise SourceError(f"{folder} is in the way: it is no folder of ours", hint="move it, or choose another -o")
    others = foreign(folder, {*_shards_of(_read_pin(folder / PIN)), PIN})
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise SourceError(
            f"{folder} is in the way: it holds {others[0]}{more}, which this program did not put there",
            hint="move what is yours out of it, or choose another -o",
        )


def _shards_of(pin: Mapping[str, Any]) -> list[str]:
    """The shards that a pin lists."""
    names = pin.get("shards")
    return names if isinstance(names, list) and all(map(is_name_below, names)) else []


def _pinned(folder: Path, repository: str, revision: str | None) -> str | None:
    """The commit that a stopped run of this repository and revision began with."""
    pin = _read_pin(folder / PIN)
    return pin.get("commit") if (pin.get("repository"), pin.get("revision")) == (repository, revision) else None


def _read_pin(place: Path) -> dict[str, Any]:
    """What the file holds; nothing when it is not there, was cut short or is not what we write."""
    with suppress(OSError, ValueError, RecursionError):
        pin = json.loads(place.read_text(encoding="utf-8"))
        return pin if isinstance(pin, dict) and isinstance(pin.get("commit"), str | None) else {}
    return {}
