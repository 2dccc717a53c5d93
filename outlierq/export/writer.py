"""Writes tensors at their planned places, and reads them back.

The files exist in full size from the start (so a full disk is found before any work), tensors are written in any
order, and nothing lies under the final name before everything is verified: the folder is renamed as the last step.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import NumbersError, OutputError
from outlierq.export.layout import INDEX_NAME, Layout

if TYPE_CHECKING:
    import torch
    import xxhash

    from outlierq.core.quant_tensor import QuantTensor

# Bytes read back at a time: all of a usual piece of a weight, as fewer calls hand Python's lock over less often.
CHUNK = 1 << 22
# A tensor that is only copied is in memory as a whole up to this size.
PIECE_BYTES = 16 << 20
FAULTY = "the disk or the exporter is faulty; the output was not put in place"


class ShardWriter:
    """The shards of one output folder. `folder` must exist; files of the right size are reused (resume)."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self._files: dict[str, int] = {}
        try:
            for name, size in layout.sizes.items():
                self._open(name, size)
            sync_folder(folder)  # else a power cut may leave a journal of units whose shards have no name
        except OutputError:
            self.close()
            raise

    def _open(self, name: str, size: int) -> None:
        path = self.folder / name
        try:
            fd = self._files[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            held = os.fstat(fd).st_size
            if held > size:  # of another recipe that was stopped before its first unit
                os.ftruncate(fd, size)
            if held < size:
                os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, self.layout.headers[name], 0)
        except OSError as error:
            raise disk_error(error, path, size) from error

    def write(self, name: str, tensor: torch.Tensor, row: int | None = None) -> None:
        """Write one tensor; its dtype and shape must be the planned ones, its numbers finite.

        row: write only the rows of `tensor` [n, ...], from this one of the planned tensor on.
        """
        place = self.layout.places[name]
        self._check(name, tensor, row)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NumbersError(f"{name} holds a NaN or Inf", hint="check the source with `outlierq inspect`")
        data = memoryview(as_bytes(tensor))
        fd, offset = self._files[place.shard], place.offset + _bytes_before(tensor, row)
        try:
            while data:
                written = os.pwrite(fd, data[: 1 << 30], offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise disk_error(error, self.folder / place.shard, place.tensor.nbytes) from error

    def _check(self, name: str, tensor: torch.Tensor, row: int | None) -> None:
        """OutputError when the tensor, or rows of it, are not what was planned."""
        planned, shape = self.layout.places[name].tensor, tuple(tensor.shape)
        fits = shape == planned.shape
        if row is not None:
            fits = shape[1:] == planned.shape[1:] and row + shape[0] <= planned.shape[0]
        if not fits or dtype_name(tensor.dtype) != planned.dtype:
            place = "" if row is None else f" from row {row} on"
            raise OutputError(
                f"{name} was planned as {planned.dtype} {list(planned.shape)} but came out as "
                f"{dtype_name(tensor.dtype)} {list(shape)}{place}"
            )

    def read(self, name: str, first: int = 0, count: int | None = None) -> Iterator[memoryview]:
        """The bytes on disk of a tensor, or `count` of them from byte `first` on, piece by piece in one buffer: a piece
        is valid until the next is asked for.
        """
        place = self.layout.places[name]
        offset, left = place.offset + first, place.tensor.nbytes - first if count is None else count
        buffer = memoryview(bytearray(min(CHUNK, left)))
        while left:
            try:
                count = os.preadv(self._files[place.shard], [buffer[: min(CHUNK, left)]], offset)
            except OSError as error:
                raise disk_error(error, self.folder / place.shard, left) from error
            if not count:
                raise OutputError(f"{place.shard} ends before {name} does, at byte {offset}")
            yield buffer[:count]
            offset, left = offset + count, left - count

    def digest(self, name: str) -> bytes:
        """XXH3-128 of the bytes on disk of a tensor."""
        import xxhash

        digest = xxhash.xxh3_128()
        for piece in self.read(name):
            digest.update(piece)
        return digest.digest()

    def confirm(
        self, name: str, tensor: torch.Tensor, row: int | None = None, digest: xxhash.xxh3_128 | None = None
    ) -> xxhash.xxh3_128:
        """Compare the bytes on disk with those of the tensor, or of rows [n, ...] of it; gives their digest (XXH3)."""
        import xxhash

        digest = xxhash.xxh3_128() if digest is None else digest
        meant, start = memoryview(as_bytes(tensor)), 0
        for piece in self.read(name, _bytes_before(tensor, row), len(meant)):
            if not same_bytes(piece, meant[start : start + len(piece)]):
                raise OutputError(f"{name}: the bytes on disk are not those that were written", hint=FAULTY)
            digest.update(piece)
            start += len(piece)
        return digest

    def sync(self) -> None:
        """Force everything written so far onto the disk, and out of the file cache.

        It was read back and is not needed again soon; what is, the source and libraries, would have to make room.
        """
        for name, fd in self._files.items():
            try:
                os.fdatasync(fd)
                leave_cache(fd)
            except OSError as error:
                raise disk_error(error, self.folder / name, 0) from error

    def close(self) -> None:
        """Close all shards."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def leave_cache(fd: int) -> None:
    """Let the system forget what it holds of a file that is on the disk, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # of a file system that cannot
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_before(tensor: torch.Tensor, row: int | None) -> int:
    """Bytes that stand before row `row` of a tensor with rows like those of `tensor`."""
    return row * tensor[:1].nbytes if row else 0


def write_small(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write small files and force them onto the disk. A name may lie in a folder; a path is copied piece by piece."""
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                if isinstance(content, Path):
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file, PIECE_BYTES)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, path, 0 if isinstance(content, Path) else len(content)) from error


def check_complete(folder: Path, layout: Layout) -> None:
    """Every planned tensor is in the files, with its planned shape, as the safetensors library reads them."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for shard in layout.sizes:
        # For numpy it maps the file to read; for torch also to write, which the system counts as memory of ours.
        with safe_open(folder / shard, framework="np") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    planned = {name: place.tensor.shape for name, place in layout.places.items()}
    wrong = sorted(set(shapes.items()) ^ set(planned.items()))
    if wrong:
        raise OutputError(f"{len(wrong)} tensors on disk differ from the plan, first {wrong[0][0]}")
    if layout.index is not None and (folder / INDEX_NAME).read_bytes() != layout.index:
        raise OutputError(f"{INDEX_NAME} differs from the plan")


def publish(work: Path, out: Path) -> None:
    """Give the finished folder its final name, once all that is in it is on the disk."""
    sync_folder(work)
    try:
        os.rename(work, out)
    except OSError as error:
        raise disk_error(error, out, 0) from error
    sync_folder(out.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder onto the disk: a power cut leaves them as they are now."""
    try:
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise disk_error(error, folder, 0) from error


def compare(name: str, decoded: QuantTensor | torch.Tensor, meant: QuantTensor) -> None:
    """What was decoded from disk must be what was meant, bit for bit: every part of a `QuantTensor`, or dense rows.

    decoded, meant: [out, in], or the same rows of both.
    """
    import torch

    if isinstance(decoded, torch.Tensor):
        dense = meant.dequantize().cpu().to(decoded.dtype)
        if not torch.equal(decoded, dense):
            worst = (decoded.float() - dense.float()).abs().max().item()
            raise OutputError(
                f"{name}: what is on disk decodes to something else than what was written (largest difference "
                f"{worst:g})",
                hint=FAULTY,
            )
        return
    for part in ("codes", "scale", "zero_point", "input_scale", "outlier_columns", "outlier_weight", "super_scale"):
        read, written = getattr(decoded, part), getattr(meant, part)
        if (read is None) != (written is None) or (read is not None and not _same(read, written.cpu())):
            raise OutputError(
                f"{name}: what is on disk decodes to something else than what was written, in its {part}", hint=FAULTY
            )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and same_bytes(as_bytes(one), as_bytes(other))


def same_bytes(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Whether two runs of bytes are equal: as the C library compares them, 4 times faster than arrays of words."""
    import numpy as np

    first, second = np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)
    return len(first) == len(second) and not _memcmp()(first.ctypes.data, second.ctypes.data, len(first))


@cache
def _memcmp() -> Callable[[int, int, int], int]:
    """`memcmp` of the C library. Other threads run meanwhile."""
    compare_memory = ctypes.CDLL(None).memcmp
    compare_memory.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
    return compare_memory


def disk_error(error: OSError, path: Path, size: int) -> OutputError:
    """An OSError as one of ours, with what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no space on the disk for {path.name} ({size:,} bytes) in {path.parent}",
            hint="free some space and run the same command again; it continues where it stopped",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return OutputError(f"{path} cannot be written: {error.strerror}", hint="choose another output folder")
    return OutputError(f"{path}: {error.strerror or error}")


def as_bytes(tensor: torch.Tensor) -> bytes | memoryview:
    """The raw bytes of a tensor of any shape, without a copy when it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element of a tensor of any shape is NaN or Inf.

    Of floats of 8 and 16 bits the bits are looked at, 5 times faster than `isfinite`, and compiled 25 times: those that
    are not finite are the ones whose masked bits are all set.
    """
    import torch

    from outlierq.ops.compiled import packing as native_packing

    masks = {
        torch.bfloat16: (torch.int16, 0x7F80),
        torch.float16: (torch.int16, 0x7C00),
        torch.float8_e4m3fn: (torch.uint8, 0x7F),
        torch.float8_e5m2: (torch.uint8, 0x7C),
    }
    if not tensor.numel():
        return True
    if tensor.dtype not in masks:
        return bool(tensor.isfinite().all())
    bits, mask = masks[tensor.dtype]
    any_masked = native_packing.any_masked(tensor, mask)
    if any_masked is not None:
        return not any_masked
    pieces = torch.split(tensor.contiguous().view(-1).view(bits), CHUNK // tensor.element_size())
    return all((piece & mask).amax().item() < mask for piece in pieces)


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint32: "U32",
    }  # fmt: skip
    return names[dtype]
