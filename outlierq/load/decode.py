"""Finding the reader of a format: what decodes a stored linear, presents a compressed checkpoint, or reads a header.

It lies above `packed/` and `gguf/`, which know nothing of it and register what they read (`packed/reading.py`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import SourceError, hinted
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.model.experts.apart import experts_apart
from outlierq.load.model.other_tools import compressor
from outlierq.load.packed.codes.numbers import Parts
from outlierq.load.packed.decoded import DecodedCheckpoint, ServedCheckpoint
from outlierq.load.packed.described import check_described, check_not_mixed, described
from outlierq.load.packed.reading import HEADERS, PRESENTATIONS, ROWS, reads_rows
from outlierq.load.source.shards import StoredTensor
from outlierq.registry import import_folder, import_installed_formats

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

FOLDERS = ("outlierq.load.packed", "outlierq.load.gguf")

ANOTHER = "the file is damaged, or config.json is that of another one; get both again, or start from the original"


@cache
def _import_readers() -> None:
    """Import every module that may hold a reader; installed packages name theirs beside their writers."""
    for folder in FOLDERS:
        import_folder(folder)
    import_installed_formats()


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights as plain matrices, one for each linear; itself when it stores them so.

    Compressed weights are decoded to float32, and experts that are stored in one tensor are presented apart. What else
    the checkpoint asks for (rounded inputs, a rounded KV cache, linears of another kind) is put into a model by the
    result's `install`. SourceError when the compression cannot be decoded and run here.
    """
    return experts_apart(_decoded(checkpoint))


def _decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when it is plain; otherwise the same checkpoint with its weights decoded to float32."""
    config = described(checkpoint)
    if not config:
        return checkpoint
    check_described(checkpoint.source, config)
    _import_readers()
    presentation = PRESENTATIONS.get(str(config.get("quant_method")))
    if presentation is None:
        raise SourceError(
            f"{checkpoint.source} is compressed with {compressor(config)}, which is not decoded here",
            hint=f"start from the original checkpoint, or from one of {', '.join(sorted(PRESENTATIONS))} or GGUF",
        )
    with hinted(ANOTHER):
        return presentation(checkpoint, config)


def presented(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as a plain one to be looked at, or as it is stored where it cannot be decoded."""
    try:
        return _decoded(checkpoint)
    except SourceError:
        return checkpoint


def served(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when it is plain; otherwise what it serves, a plain one in its own dtype: the source of a
    compression (see `packed/decoded.py`).

    SourceError when it cannot be decoded, or when some of its weights are plain that should not be.
    """
    plain = _decoded(checkpoint)
    if not isinstance(plain, DecodedCheckpoint):
        return experts_apart(plain)
    check_not_mixed(plain, described(checkpoint) or {})
    return experts_apart(ServedCheckpoint(plain))


def decode_rows(
    format: str, stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int
) -> QuantTensor | torch.Tensor:
    """Output rows [start, stop) of a linear as it lies on disk, for comparison with what was meant.

    See `reads_rows` for what is given. Weights are [out, in] here, also where the file holds [in, out]. format: its
    name. stored: tensors by role. shape: (out, in). start: a multiple of 32 (zero points are packed along rows) and of
    a block's height. SourceError when the tensors do not fit, or no reader takes them.
    """
    _import_readers()
    readers = ROWS.get(format, {})
    fitting = [roles for roles in readers if roles <= stored.keys()]
    if not fitting:
        raise SourceError(f"no decoder of {format} is known for a linear stored as {', '.join(sorted(stored))}")
    most_particular = max(fitting, key=len)
    return readers[most_particular](stored, scheme, shape, start, stop)


def read_headers(container: str, path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by its header. container: that of its format. SourceError when no reader is known."""
    _import_readers()
    if container not in HEADERS:
        raise SourceError(f"no reader is known for the headers of {container} files")
    return HEADERS[container](path)


@reads_rows("dense", "weight")
def _dense_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """A plain weight."""
    return stored["weight"][start:stop]
