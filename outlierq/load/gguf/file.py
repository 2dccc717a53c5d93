"""The bytes of a GGUF file: tensor headers checked against the file's length, tensors read and dequantized by rows.

The headers are parsed by gguf's own reader, which maps the file into memory; it is asked for headers only and let go,
and tensors are read with plain reads, so that no mapped page stays resident.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.untrusted import brief
from outlierq.load.source.shards import AGAIN, read_exactly

if TYPE_CHECKING:
    import numpy as np
    import torch

# A vocabulary of 256,000 tokens with scores, types and merges has about a million; the format has 4 dimensions.
MOST_ARRAY_ITEMS, MOST_DIMENSIONS = 1 << 22, 8

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")

# Rows are dequantized in runs of about this many values: 64 MiB of float32, small beside any block of a large model.
VALUES_PER_RUN = 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. type: ggml type name ("Q4_K"). shape: row-major (GGUF itself writes it reversed).

    start: offset of its first byte in the file. row_bytes: stored bytes of one row of the last dimension.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensor bytes, `data_start` of them. fields: metadata by key, arrays left out."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensor headers; SourceError when the file is not GGUF, damaged, cut off or one part of several."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise SourceError(f"{path.name} is not a GGUF file: it begins with {magic!r}, not b'GGUF'", hint=AGAIN)
    needs_extra("gguf")
    try:
        reader = _headers_only()(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if field.data}
        entries, byte_order, data_start = reader.entries, reader.byte_order, int(reader.data_offset)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise SourceError(f"the header of {path.name} cannot be read: {error}", hint=AGAIN) from error
    if byte_order != "I":
        raise SourceError(f"{path.name} is a big-endian GGUF file", hint="convert it to little-endian")
    parts = fields.get("split.count", 1)
    if not isinstance(parts, int) or parts > 1:
        raise SourceError(
            f"{path.name} is one of {parts} parts of a GGUF file",
            hint="join the parts first: llama-gguf-split --merge FIRST_PART OUTPUT",
        )
    tensors = {entry[0]: _tensor(path, *entry) for entry in entries}
    _check_bounds(path, tensors, data_start)
    return GgufHeader(path, fields, tensors, data_start)


def _headers_only() -> type:
    """gguf's reader, kept from touching tensor bytes (and from failing without figures where they are missing).

    It also steps over arrays: a vocabulary is hundreds of thousands of strings, seconds of parsing for nothing here.
    """
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class HeaderReader(GGUFReader):
        entries: list[tuple[str, int, tuple[int, ...], int]]
        items = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            # The slice of a number that the file does not hold is empty, and gguf would go on reading nothing.
            self._need(offset + int(count) * np.dtype(dtype).itemsize)
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            items, count = GGUFValueType(self._number(orig_offs, 4)), self._number(orig_offs + 4, 8)
            self.items += count
            if items == GGUFValueType.ARRAY or self.items > MOST_ARRAY_ITEMS:
                # transformers makes several objects of every item, and recurses into arrays of arrays.
                raise ValueError(f"its metadata has arrays in arrays, or more than {MOST_ARRAY_ITEMS} items in arrays")
            end = orig_offs + 12
            if items == GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + self._number(end, 8)
            else:
                end += count * np.dtype(self.gguf_scalar_to_np[items]).itemsize
            self._need(end)
            return end - orig_offs, [], [], [GGUFValueType.ARRAY, items]

        def _need(self, end: int) -> None:
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, inside its metadata")

        def _number(self, start: int, width: int) -> int:
            self._need(start + width)
            return int.from_bytes(self.data[start : start + width].tobytes(), "little")

        def _build_tensors(self, start_offs: int, fields: list) -> None:
            self.entries = []
            for field in fields:
                _, name, _, dims, kind, offset = field.parts
                shape = tuple(reversed(dims.tolist()))
                self.entries.append((bytes(name).decode(), int(kind[0]), shape, int(start_offs + offset[0])))
            if len({entry[0] for entry in self.entries}) < len(self.entries):
                raise ValueError("a tensor is named twice")

    return HeaderReader


def _tensor(path: Path, name: str, kind: int, shape: tuple[int, ...], start: int) -> GgufTensor:
    """One header, refused when its type is not supported or its rows do not hold whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    type_name = next((known.name for known in GGMLQuantizationType if known == kind), f"number {kind}")
    if type_name not in SUPPORTED:
        raise SourceError(
            f"tensor {name} in {path.name} has type {type_name}, which is not supported "
            f"(supported: {', '.join(SUPPORTED)})",
            hint="take a file of a supported type; the less compressed, the better the result",
        )
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not 1 <= len(shape) <= MOST_DIMENSIONS or min(shape) < 1 or shape[-1] % block:
        raise SourceError(
            f"tensor {name} in {path.name}: rows of shape {brief(shape)} are no multiple of {block} values"
        )
    row_bytes = shape[-1] // block * block_bytes
    return GgufTensor(name, type_name, shape, start, prod(shape[:-1]) * row_bytes, row_bytes)


def _check_bounds(path: Path, tensors: dict[str, GgufTensor], begin: int) -> None:
    """Tensors must not overlap the header or one another, and must end inside the file."""
    size, end, previous = path.stat().st_size, begin, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise SourceError(f"tensor {tensor.name} in {path.name} overlaps {previous}", hint=AGAIN)
        end, previous = tensor.start + tensor.nbytes, tensor.name
    if end > size:
        raise SourceError(
            f"{path.name} is cut off: its headers describe {end} bytes, the file holds {size} ({end - size} missing)",
            hint=AGAIN,
        )


def dequantized(
    path: Path, tensor: GgufTensor, dtype: torch.dtype, digests: dict[str, str] | None = None
) -> torch.Tensor:
    """The values in `dtype`, in the shape of the header; exact float32 values are computed run by run, rounded once.

    digests: gets the XXH3-128 of the tensor's bytes.
    """
    import numpy as np
    import torch
    import xxhash
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = prod(tensor.shape[:-1])
    values = torch.empty((rows, tensor.shape[-1]), dtype=dtype)
    run = max(1, VALUES_PER_RUN // tensor.shape[-1])
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        for first in range(0, rows, run):
            count = min(run, rows - first)
            raw = np.empty((count, tensor.row_bytes), np.uint8)
            start = tensor.start + first * tensor.row_bytes
            read_exactly(file, start, memoryview(raw).cast("B"), tensor.name, path)
            digest.update(memoryview(raw).cast("B"))
            plain = dequantize(raw.view(_plain_dtype(tensor.type)), GGMLQuantizationType[tensor.type])
            values[first : first + count] = torch.from_numpy(np.ascontiguousarray(plain))
    if digests is not None:
        digests.setdefault(tensor.name, digest.hexdigest())
    return values.reshape(tensor.shape)


def _plain_dtype(type_name: str) -> str:
    """How gguf wants the bytes of a type: as numbers where numpy has them, as bytes otherwise."""
    return {"F32": "<f4", "F16": "<f2"}.get(type_name, "u1")
