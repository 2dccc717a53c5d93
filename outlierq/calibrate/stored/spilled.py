"""Statistics of one block that wait in a file until they are asked for, where all of them do not fit into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.stats import InputStats

if TYPE_CHECKING:
    import torch

Change = Callable[[InputStats], InputStats]


@dataclass(frozen=True)
class _Entry:
    """Where the statistics of one group lie. tensors: field -> (offset, dtype, shape, device)."""

    tokens: int
    sequences: int
    tensors: Mapping[str, tuple[int, Any, tuple[int, ...], Any]]


class SpilledStats(Mapping[str, InputStats]):
    """Statistics by group name, each read anew when it is asked for, and then changed as `changed` said.

    The file has no name, so nothing is left behind by a run that was killed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115, closed when it is forgotten
        self._entries: dict[str, _Entry] = {}
        self._changes: dict[str, list[Change]] = {}

    def put(self, stats: dict[str, InputStats]) -> None:
        """Take some groups, emptying the dict. OutputError when the disk is full."""
        while stats:
            name, held = stats.popitem()
            tensors = {field: self._write(tensor) for field, tensor in held.tensors().items()}
            self._entries[name] = _Entry(held.tokens, held.sequences, tensors)
            self._changes[name] = []

    def changed(self, change: Change, names: Collection[str]) -> SpilledStats:
        """The same with one more change to some groups, carried out when they are read."""
        for name in names:
            self._changes[name].append(change)
        return self

    def __getitem__(self, name: str) -> InputStats:
        entry = self._entries[name]
        stats = InputStats(entry.tokens, entry.sequences, **{f: self._read(*at) for f, at in entry.tensors.items()})
        for change in self._changes[name]:
            stats = change(stats)
        return stats

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _write(self, tensor: torch.Tensor) -> tuple[int, Any, tuple[int, ...], Any]:
        """Append a tensor; where it lies."""
        import torch

        start = self._file.seek(0, 2)
        left = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(
                f"statistics of {tensor.nbytes:,} bytes cannot be put into {self._folder}: {error.strerror or error}",
                hint="free some space and run the same command again; it continues where it stopped",
            ) from error
        return start, tensor.dtype, tuple(tensor.shape), tensor.device

    def _read(self, start: int, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """A tensor in fresh memory."""
        import torch

        tensor = torch.empty(shape, dtype=dtype)
        left = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(start)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OutputError(f"the file of statistics in {self._folder} has become shorter")
            left = left[count:]
        return tensor.to(device)


def each_changed(
    stats: Mapping[str, InputStats], change: Change, names: Collection[str] | None = None
) -> Mapping[str, InputStats]:
    """Statistics with some groups (default: all) changed, one at a time; a dict is changed in place.

    Never are all of them there twice: together they are the largest thing in memory.
    """
    targets = [name for name in stats if names is None or name in names]
    if isinstance(stats, SpilledStats):
        return stats.changed(change, targets)
    assert isinstance(stats, dict), f"statistics in a {type(stats).__name__} cannot be changed"
    for name in targets:
        stats[name] = change(stats[name])
    return stats
