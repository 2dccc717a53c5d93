"""`--like template.gguf`: the frame that a Hugging Face model is written into, proved to be of this very model.

llama.cpp's converter renames tensors, changes the order of some rows and adds 1 to some gains. Which of that it did is
not believed but tried: every tensor of the model is held against the template's values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from outlierq.core.errors import OutlierqError, SourceError
from outlierq.core.model import Checkpoint, Frame
from outlierq.export.gguf.format import GgufFormat
from outlierq.load import served
from outlierq.load.gguf.file import GgufHeader, some_rows
from outlierq.load.gguf.frame import PLAIN, frame_of
from outlierq.load.gguf.split import read_gguf

if TYPE_CHECKING:
    import torch

HINT = "give a file that llama.cpp's converter made of this very model, best in 16 bits"
STATS_HINT = (
    "give --stats of the original Hugging Face model (outlierq calibrate), or an importance matrix: "
    "-r gguf-imatrix-q4_k_m --stats imatrix.gguf"
)
# Rows of a tensor that are compared.
ROWS = 64
# A number rounded to bfloat16 or float16 differs by 2^-9 of itself at most, a small one of float16 by more.
ROUNDED, SMALL = 2**-8, 2**-12
# Relative error of a packed tensor, whatever its type, beside that of another model's: about 1.4.
PACKED = 0.5


def framed_like(checkpoint: Checkpoint, template: Path, *, prove: bool) -> Frame:
    """The frame of a template. SourceError with the name of the first tensor that is not that of the model.

    prove: compare values, for which some rows of every tensor are read; without it names and shapes only.
    """
    _refuse_mixture(checkpoint)
    header = read_gguf(template)
    frame = frame_of(header, own_names=False)
    ways = [(rotated, less_one) for rotated in (False, True) for less_one in (False, True)]
    faults = []
    for rotated, less_one in ways if prove else ways[:1]:
        tried = replace(frame, rotated=rotated, gains_less_one=less_one)
        fault = next(_faults(checkpoint, tried, header, prove), None)
        if fault is None:
            return tried
        faults.append(fault)
    # The way that came farthest says most.
    raise SourceError(max(faults)[1], hint=HINT)


def _refuse_mixture(checkpoint: Checkpoint) -> None:
    """SourceError for a GGUF file of a mixture: what each of its experts sees is not collected."""
    together = (name for name, info in checkpoint.tensors.items() if ".experts." in name and len(info.shape) > 2)
    name = next(together, None) if checkpoint.kind == "gguf" else None
    if name is not None:
        raise SourceError(
            f"{name} of {checkpoint.source} holds all experts of a block; out of a GGUF file they are not calibrated",
            hint=STATS_HINT,
        )


def _faults(checkpoint: Checkpoint, frame: Frame, header: GgufHeader, prove: bool) -> Iterator[tuple[int, str]]:
    """(number of the tensor, sentence) for every tensor that is not that of the template."""
    plain, template = served(checkpoint), header.path.name
    format, left = GgufFormat(plain.config, frame), {tensor.name for tensor in frame.tensors} - frame.extras.keys()
    for number, (name, info) in enumerate(plain.tensors.items()):
        try:
            specs = format.plain_specs(info)
        except OutlierqError as error:
            yield number, error.what
            continue
        left -= {spec[0] for spec in specs}
        missing = [spec[0] for spec in specs if spec[0] not in frame.by_name]
        if missing:
            yield number, f"{template} has no tensor {missing[0]}, which {name} of {plain.source} becomes"
        elif prove:
            said = _difference(plain, format, header, name)
            if said:
                yield number, f"tensor {said} of {template} is not {name} of {plain.source}"
    if left:
        yield len(plain.tensors), f"{template} has the tensor {min(left)}, and {plain.source} has none for it"


def _difference(plain: Checkpoint, format: GgufFormat, header: GgufHeader, name: str) -> str | None:
    """The template's tensor that has other values than the model's, and how; None where all are equal."""
    place = format.number_in_stack(name)
    for written, tensor in format.plains(name, plain.read(name)):
        stored = header.tensors[written]
        rows = tensor.reshape(-1, tensor.shape[-1])
        if rows.shape[1] != stored.shape[-1] or prod(stored.shape) < tensor.numel():
            return f"{written}, of shape {list(stored.shape)},"
        found = some_rows(stored, (place or 0) * len(rows), min(ROWS, len(rows)))
        meant = rows[:ROWS].float()
        if found is not None and not _equal(meant, found, stored.type in PLAIN):
            return f"{written}, whose values differ by up to {float((meant - found).abs().max()):g},"
    return None


def _equal(tensor: torch.Tensor, found: torch.Tensor, is_plain: bool) -> bool:
    """Whether values are the same but for rounding, of plain or of packed types."""
    difference, largest = (tensor - found).abs(), float(tensor.abs().max())
    if is_plain:
        return bool((difference <= ROUNDED * tensor.abs() + SMALL * largest).all())
    return float(difference.norm()) <= PACKED * float(tensor.norm())
