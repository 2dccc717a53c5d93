"""Safetensors files: headers checked before a byte of a weight is believed, tensors read without a memory map.

`safetensors.safe_open` maps the file, and a tensor taken from it keeps the mapped pages resident; reading a deep model
block by block would then slowly fill the memory. Here a tensor is one `readinto` of its own byte range.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError, nearest
from outlierq.core.machine.untrusted import brief, json_object
from outlierq.core.model import TensorInfo
from outlierq.load.source.read_ahead import AHEAD, will_need

if TYPE_CHECKING:
    import torch

Entry = TypeVar("Entry")

# The limit of the safetensors library itself; a larger number is a damaged or hostile file, not a header.
LARGEST_HEADER = 100_000_000

# Bytes; a longer header belongs to a file of gigabytes. One of 300,000 empty tensors would keep every check busy.
USUAL_HEADER = 4_000_000

# torch's limits on a tensor: its dimensions, and the bits of its size in bytes.
MOST_DIMENSIONS, LARGEST_SIZE = 64, 1 << 63

AGAIN = "download or copy the file again"

# Bytes of a tensor that are digested at a time.
PIECE_BYTES = 1 << 22

# Opens a weight file without a buffer of its own; a file that is not here yet is fetched first.
Opener = Callable[[Path], BinaryIO]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one safetensors file. start: offset of its first byte in the file."""

    info: TensorInfo
    path: Path
    start: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by name, in the order of their bytes.

    SourceError when the file is shorter than its header says, or the header contradicts itself.
    """
    try:
        with path.open("rb") as file:
            return parse_header(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror or error}") from error


def parse_header(path: Path, file: BinaryIO, size: int) -> dict[str, StoredTensor]:
    """The same from an open file, of which no more than the header is read. size: bytes of the whole file."""
    header, begin = _parse(path, file, size)
    header.pop("__metadata__", None)
    spans = sorted((_span(path, name, entry) for name, entry in header.items()), key=lambda span: span[:2])
    _check_layout(path, [(first, last, info.name) for first, last, info in spans], size - begin)
    return {info.name: StoredTensor(info, path, begin + first) for first, _, info in spans}


def _parse(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON and the offset at which tensor bytes begin."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise SourceError(f"{path.name} holds {size} bytes, too few for a safetensors file", hint=AGAIN)
    length = int.from_bytes(prefix, "little")
    if length > LARGEST_HEADER:
        raise SourceError(
            f"{path.name} is not a safetensors file: its header would be {length} bytes long",
            hint="a Git LFS pointer or a web page saved by mistake looks like this; " + AGAIN,
        )
    if 8 + length > size:
        raise SourceError(f"{path.name} is cut off: header of {length} bytes, file of {size} bytes", hint=AGAIN)
    if length > max(USUAL_HEADER, size - 8 - length):
        raise SourceError(
            f"{path.name} has a header of {length:,} bytes for {size - 8 - length:,} bytes of tensors; it is no model",
            hint=AGAIN,
        )
    text = file.read(length)
    name = f"the header of {path.name}"
    return json_object(text, name, SourceError, hint=AGAIN, pairs=lambda pairs: _no_repeats(path, pairs)), 8 + length


def _no_repeats(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when a key comes twice (json would silently keep the last)."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise SourceError(f"the header of {path.name} names {twice} twice", hint=AGAIN)
    return entries


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """(first byte, byte after the last, header) of one entry, checked against its own dtype and shape."""
    where = f"tensor {name} in {path.name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise SourceError(f"{where} has no dtype, shape and data_offsets", hint=AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        said = f"shape {brief(shape)} and data_offsets {brief(offsets)}"
        raise SourceError(f"{where} has {said}, not counts", hint=AGAIN)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SourceError(
            f"{where} has dtype {brief(dtype)}, which is not supported (supported: {', '.join(DTYPES)})",
            hint="convert the checkpoint to a supported dtype",
        )
    first, last = offsets
    nbytes = prod(shape) * DTYPES[dtype][1]
    if prod(max(size, 1) for size in shape) * DTYPES[dtype][1] >= LARGEST_SIZE:
        raise SourceError(f"{where} has shape {brief(shape)}, more than a tensor can have", hint=AGAIN)
    if last - first != nbytes:
        raise SourceError(f"{where}: shape {shape} of {dtype} needs {nbytes} bytes, offsets give {last - first}")
    return first, last, TensorInfo(name, dtype, tuple(shape), nbytes)


def _counts(values: Any) -> bool:
    """Whether this is a short list of non-negative integers whose product a tensor can have as its size."""
    if not isinstance(values, list) or len(values) > MOST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < LARGEST_SIZE for value in values)


def _check_layout(path: Path, spans: list[tuple[int, int, str]], available: int) -> None:
    """Tensors must follow one another without overlap or gap, and end inside the file."""
    end, previous = 0, "the header"
    for first, last, name in spans:
        if first != end:
            fault = "overlaps" if first < end else f"leaves {first - end} unused bytes after"
            raise SourceError(f"tensor {name} in {path.name} {fault} {previous}", hint=AGAIN)
        end, previous = last, name
    if end > available:
        raise SourceError(
            f"{path.name} is cut off: its header describes {end} bytes of tensors, the file holds {available} "
            f"({end - available} missing)",
            hint=AGAIN,
        )
    if end < available:
        raise SourceError(f"{path.name} holds {available - end} bytes after its last tensor", hint=AGAIN)


def open_plain(path: Path) -> BinaryIO:
    """The file as it lies on this machine."""
    return path.open("rb", buffering=0)


def read_stored(
    tensors: dict[str, StoredTensor],
    names: Iterable[str],
    opened: Opener = open_plain,
    digests: dict[str, str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor in the shape of its header) for each name, grouped by file so that each file is opened once.

    digests: gets the XXH3-128 of the bytes of each tensor that it does not have yet.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for name in names:
        stored = lookup(tensors, name)
        by_file.setdefault(stored.path, []).append(stored)
    for path, group in by_file.items():
        with reading(path), opened(path) as file:
            for stored in sorted(group, key=lambda stored: stored.start):
                yield stored.info.name, _read_one(file, stored, digests)


def read_rows(
    stored: StoredTensor, count: int, opened: Opener = open_plain, digests: dict[str, str] | None = None
) -> Iterator[torch.Tensor]:
    """A tensor `count` rows at a time, [<= count, ...], in one buffer: a piece is valid until the next is asked for.

    Fresh memory for every tensor would cost more than reading it: the system clears each page before it is filled.
    digests: as above, once the last row is read.
    """
    import torch
    import xxhash

    digest = xxhash.xxh3_128()
    rows = stored.info.shape[0]
    row_bytes = stored.info.nbytes // max(1, rows)
    raw = torch.empty(min(count, rows) * row_bytes, dtype=torch.uint8)
    with reading(stored.path), opened(stored.path) as file:
        for first in range(0, rows, count):
            part = raw[: min(count, rows - first) * row_bytes]
            start = stored.start + first * row_bytes
            will_need(file, start + AHEAD * bool(first), len(part) if first else AHEAD)
            read_exactly(file, start, memoryview(part.numpy()), stored.info.name, stored.path)
            if digests is not None:
                digest.update(memoryview(part.numpy()))
            yield part.view(torch_dtype(stored.info.dtype)).view(-1, *stored.info.shape[1:])
    if digests is not None:
        digests.setdefault(stored.info.name, digest.hexdigest())


def stored_digest(name: str, path: Path, start: int, nbytes: int, opened: Opener = open_plain) -> str:
    """XXH3-128 of bytes of a file, as hex; read piece by piece."""
    import xxhash

    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(nbytes, PIECE_BYTES)))
    with reading(path), opened(path) as file:
        for first in range(0, nbytes, PIECE_BYTES):
            part = buffer[: min(PIECE_BYTES, nbytes - first)]
            read_exactly(file, start + first, part, name, path)
            digest.update(part)
    return digest.hexdigest()


def read_some_rows(stored: StoredTensor, rows: Iterable[int], opened: Opener = open_plain) -> torch.Tensor:
    """Some rows of a tensor, [n, ...] in the given order, in fresh memory; SourceError for a row it does not have."""
    import torch

    numbers, shape = list(rows), stored.info.shape
    beyond = [row for row in numbers if not 0 <= row < shape[0]]
    if beyond:
        raise SourceError(f"{stored.info.name} has {shape[0]} rows, and row {beyond[0]} was asked for")
    row_bytes = stored.info.nbytes // max(1, shape[0])
    raw = torch.empty(len(numbers) * row_bytes, dtype=torch.uint8)
    memory = memoryview(raw.numpy())
    with reading(stored.path), opened(stored.path) as file:
        for place, row in enumerate(numbers):
            target = memory[place * row_bytes : (place + 1) * row_bytes]
            read_exactly(file, stored.start + row * row_bytes, target, stored.info.name, stored.path)
    return raw.view(torch_dtype(stored.info.dtype)).view(len(numbers), *shape[1:])


def lookup(tensors: Mapping[str, Entry], name: str) -> Entry:
    """The entry of a tensor; SourceError with the nearest name when there is none."""
    if name in tensors:
        return tensors[name]
    close = nearest(name, list(tensors))
    raise SourceError(
        f"the checkpoint has no tensor {name} among its {len(tensors)}",
        hint=f"did you mean {close}?" if close else None,
    )


def _read_one(file: BinaryIO, stored: StoredTensor, digests: dict[str, str] | None) -> torch.Tensor:
    """Read one tensor's bytes into fresh memory."""
    import torch
    import xxhash

    raw = torch.empty(stored.info.nbytes, dtype=torch.uint8)
    read_exactly(file, stored.start, memoryview(raw.numpy()), stored.info.name, stored.path)
    if digests is not None and stored.info.name not in digests:
        digests[stored.info.name] = xxhash.xxh3_128_hexdigest(memoryview(raw.numpy()))
    return raw.view(getattr(torch, DTYPES[stored.info.dtype][0])).reshape(stored.info.shape)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says about a file that cannot be read, as a SourceError."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}",
            hint="when the file is there again and sound, run the same command again; it continues where it stopped",
        ) from error


def read_exactly(file: BinaryIO, start: int, target: memoryview, name: str, path: Path) -> None:
    """Fill `target` from the file, from offset `start`; SourceError when the file has become shorter."""
    file.seek(start)
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise SourceError(f"{path.name} ended while reading {name}: {len(target) - done} bytes missing", hint=AGAIN)
        done += count


def sample(stored: Iterable[tuple[str, Path, int, int]], length: int) -> Iterator[tuple[str, bytes]]:
    """(name, first `length` bytes) of each (name, path, start, nbytes); files are opened once, in the given order."""
    file, opened = None, None
    try:
        for name, path, start, nbytes in stored:
            raw = bytearray(min(nbytes, length))
            with reading(path):
                if path != opened:
                    if file is not None:
                        file.close()
                    file, opened = path.open("rb", buffering=0), path
                read_exactly(file, start, memoryview(raw), name, path)
            yield name, bytes(raw)
    finally:
        if file is not None:
            file.close()


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    return getattr(torch, DTYPES[name][0])
