"""A checkpoint written again with other numbers in some of its tensors: same files, same headers, same other bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutputError
from outlierq.core.machine.record import OF_TENSORS, file_entry
from outlierq.core.model import Checkpoint
from outlierq.core.report import REPORT_NAME
from outlierq.export.writer import FAULTY, as_bytes, disk_error, write_small
from outlierq.load import read_headers
from outlierq.load.record import weights_digest
from outlierq.load.source.folder import INDEX
from outlierq.load.source.shards import StoredTensor, stored_digest

if TYPE_CHECKING:
    import torch


def file_names(checkpoint: Checkpoint) -> dict[str, bytes | Path]:
    """Everything that a patched folder holds but its report: by name, small files with their bytes."""
    folder = checkpoint.path
    weights = {path.resolve() for path in checkpoint.weight_files}
    files: dict[str, bytes | Path] = {file.name: file.held() for file in checkpoint.files if file.name != REPORT_NAME}
    files |= {path.name: path for path in sorted(folder.iterdir()) if path.resolve() in weights}
    return files | {name: folder / name for name in ("config.json", INDEX) if (folder / name).is_file()}


def write_patched(checkpoint: Checkpoint, work: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write the folder, with `tensors` in the place of those that are stored under their names; gives the record's
    entries of its files.

    tensors: each in the shape and dtype of its header. OutputError when a byte on disk is not what was meant.
    """
    files = file_names(checkpoint)
    write_small(work, files)
    weights = [name for name in files if name.endswith(".safetensors")]
    left = dict(tensors)
    for name in weights:
        stored, source = read_headers("safetensors", work / name), read_headers("safetensors", checkpoint.path / name)
        inside = {tensor: left.pop(tensor) for tensor in stored if tensor in left}
        _patch(work / name, stored, inside)
        _check(stored, source, inside)
    if left:
        raise OutputError(f"{len(left)} tensors to be replaced are in no file, first {next(iter(left))}")
    return {name: _entry(work / name, name in weights) for name in files}


def _patch(path: Path, stored: Mapping[str, StoredTensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors at their places in a file. OutputError when one is not as its header says."""
    from outlierq.export.writer import dtype_name

    try:
        with path.open("r+b") as file:
            for name, tensor in tensors.items():
                info = stored[name].info
                if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (info.dtype, info.shape):
                    raise OutputError(f"{name} is stored as {info.dtype} {list(info.shape)}, and came out as another")
                file.seek(stored[name].start)
                file.write(as_bytes(tensor))
            file.flush()
    except OSError as error:
        raise disk_error(error, path, 0) from error


def _check(
    stored: Mapping[str, StoredTensor], source: Mapping[str, StoredTensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Read a file back: what was replaced is what was meant, and all else what the source has."""
    import xxhash

    for name, after in stored.items():
        before = source[name]
        meant = xxhash.xxh3_128_hexdigest(as_bytes(tensors[name])) if name in tensors else _digest(name, before)
        if _digest(name, after) != meant:
            raise OutputError(f"{name}: the bytes on disk are not those that were written", hint=FAULTY)


def _digest(name: str, stored: StoredTensor) -> str:
    """XXH3-128 hex of the bytes of a tensor of any shape."""
    return stored_digest(name, stored.path, stored.start, stored.info.nbytes)


def _entry(path: Path, holds_weights: bool) -> dict[str, Any]:
    """The record's entry of a file."""
    if not holds_weights:
        return file_entry(path)
    return {"bytes": path.stat().st_size, OF_TENSORS: weights_digest(path)}


def work_files(checkpoint: Checkpoint, others: Iterable[str]) -> frozenset[str]:
    """Every name that a run may write."""
    return frozenset([*file_names(checkpoint), REPORT_NAME, *others])
