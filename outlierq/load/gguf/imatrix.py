"""Reads an importance matrix as `llama-imatrix` writes it: a GGUF file of sums of squares of the inputs of tensors.

`NAME.in_sum2` F32 [matrices, in] and `NAME.counts` F32 [matrices, 1], tokens that were summed; a mixture has a matrix
for each expert. The form before GGUF (.dat) is not read; `llama-imatrix --in-file OLD.dat -o NEW.gguf` converts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError, StatsError
from outlierq.load.gguf.file import dequantized, read_gguf_header

if TYPE_CHECKING:
    import torch

SUMS, COUNTS = ".in_sum2", ".counts"
CONVERT = "give a file that llama-imatrix wrote; it converts older ones: llama-imatrix --in-file OLD.dat -o NEW.gguf"


@dataclass(frozen=True)
class Importance:
    """What is known of the input of a tensor. sums: [matrices, in] float32 of squares; counts: [matrices] tokens."""

    sums: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Imatrix:
    """A whole file. chunks, chunk_size: of the text that the model read, how many and of how many tokens."""

    path: Path
    entries: Mapping[str, Importance]
    chunks: int
    chunk_size: int

    @property
    def description(self) -> str:
        """The tokens that the model read, in words."""
        return f"the importance matrix {self.path.name}, {self.chunks} x {self.chunk_size} tokens"


def read_imatrix(path: Path) -> Imatrix:
    """The importance of every tensor by its name in a GGUF file. StatsError when it is no such file, or damaged."""
    import torch

    try:
        header = read_gguf_header(path)
        values = {
            name: dequantized(tensor, torch.float32)
            for name, tensor in header.tensors.items()
            if name.endswith((SUMS, COUNTS))
        }
    except SourceError as error:
        raise StatsError(f"{path.name} is no importance matrix: {error.what}", hint=CONVERT) from error
    names = [name.removesuffix(SUMS) for name in values if name.endswith(SUMS)]
    if header.fields.get("general.type") != "imatrix" or not names:
        raise StatsError(f"{path.name} is a GGUF file, but no importance matrix", hint=CONVERT)
    entries = {name: _entry(path, name, values) for name in names}
    chunks, size = (_number(header.fields, f"imatrix.chunk_{what}") for what in ("count", "size"))
    return Imatrix(path, entries, chunks, size)


def _entry(path: Path, name: str, values: Mapping[str, torch.Tensor]) -> Importance:
    """The sums and counts of a tensor; StatsError where they do not fit, or are no sums of squares."""
    sums, counts = values[f"{name}{SUMS}"], values.get(f"{name}{COUNTS}")
    sums = sums.reshape(-1, sums.shape[-1])
    if counts is None or counts.numel() not in (1, len(sums)):
        raise StatsError(f"{path.name} has no count of tokens for each matrix of {name}", hint="make it again")
    counts = counts.flatten().expand(len(sums))
    if not (sums.isfinite().all() and (sums >= 0).all() and counts.isfinite().all() and (counts >= 0).all()):
        raise StatsError(f"{path.name} holds negative sums of squares of {name}, NaN or Inf", hint="make it again")
    return Importance(sums, counts)


def _number(fields: Mapping[str, Any], key: str) -> int:
    """A number of the metadata, 0 where it is missing."""
    value = fields.get(key, 0)
    return value if isinstance(value, int) else 0
