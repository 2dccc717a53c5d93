"""Writes tensors at their planned places, and reads them back.

The files exist in full size from the start (so a full disk is found before any work), tensors are written in any
order, and nothing lies under the final name before everything is verified: the folder is renamed as the last step.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import NumbersError, OutputError
from outlierq.export.layout import INDEX_NAME, Layout

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 24


class ShardWriter:
    """The shards of one output folder. `folder` must exist; files of the right size are reused (resume)."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout = folder, layout
        self._files: dict[str, int] = {}
        for name, size in layout.sizes.items():
            self._files[name] = self._open(name, size)

    def _open(self, name: str, size: int) -> int:
        path = self.folder / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(fd).st_size != size:
                os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, self.layout.headers[name], 0)
        except OSError as error:
            os.close(fd)
            raise disk_error(error, path, size) from error
        return fd

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; its dtype and shape must be the planned ones, its numbers finite."""
        place = self.layout.places[name]
        if tuple(tensor.shape) != place.tensor.shape or dtype_name(tensor.dtype) != place.tensor.dtype:
            raise OutputError(
                f"{name} was planned as {place.tensor.dtype} {list(place.tensor.shape)} but came out as "
                f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NumbersError(f"{name} holds a NaN or Inf", hint="check the source with `outlierq inspect`")
        data = memoryview(as_bytes(tensor))
        fd, offset = self._files[place.shard], place.offset
        try:
            while data:
                written = os.pwrite(fd, data[: 1 << 30], offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise disk_error(error, self.folder / place.shard, place.tensor.nbytes) from error

    def hash(self, names: list[str]) -> str:
        """sha256 hex of the bytes on disk of the named tensors, in the given order."""
        digest = hashlib.sha256()
        for name in names:
            place = self.layout.places[name]
            offset, left = place.offset, place.tensor.nbytes
            while left:
                data = os.pread(self._files[place.shard], min(CHUNK, left), offset)
                if not data:
                    raise OutputError(f"{place.shard} ends before {name} does, at byte {offset}")
                digest.update(data)
                offset, left = offset + len(data), left - len(data)
        return digest.hexdigest()

    def sync(self) -> None:
        """Force everything written so far onto the disk."""
        for name, fd in self._files.items():
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise disk_error(error, self.folder / name, 0) from error

    def close(self) -> None:
        """Close all shards."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def write_small(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write small files and force them onto the disk."""
    for name, content in files.items():
        path = folder / name
        try:
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, path, len(content)) from error


def check_complete(folder: Path, layout: Layout) -> None:
    """Every planned tensor is in the files, with its planned shape, as the safetensors library reads them."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for shard in layout.sizes:
        with safe_open(folder / shard, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    planned = {name: place.tensor.shape for name, place in layout.places.items()}
    wrong = sorted(set(found.items()) ^ set(planned.items()))
    if wrong:
        raise OutputError(f"{len(wrong)} tensors on disk differ from the plan, first {wrong[0][0]}")
    if layout.index is not None and (folder / INDEX_NAME).read_bytes() != layout.index:
        raise OutputError(f"{INDEX_NAME} differs from the plan")


def publish(work: Path, out: Path) -> None:
    """Give the finished folder its final name."""
    os.rename(work, out)
    directory = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def compare(name: str, decoded: torch.Tensor, expected: torch.Tensor) -> None:
    """The tensor decoded from disk must equal the one in memory, bit for bit."""
    import torch

    if not torch.equal(decoded, expected):
        worst = (decoded - expected).abs().max().item()
        raise OutputError(
            f"{name}: what is on disk decodes to something else than what was written (largest difference {worst:g})",
            hint="the disk or the exporter is faulty; the output was not put in place",
        )


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
    """The raw bytes of a tensor, without a copy when it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    import torch

    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint32: "U32",
    }  # fmt: skip
    return names[dtype]
