"""The bytes of a GGUF file: tensor headers checked against the file's length, tensors read and dequantized by rows.

The headers are parsed by gguf's own reader, which maps the file into memory; it is asked for headers only and let go,
and tensors are read with plain reads, so that no mapped page stays resident. Parts of a split file are read as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.gguf.types import block_types
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.untrusted import brief
from outlierq.load.source.shards import AGAIN, read_exactly, reading

if TYPE_CHECKING:
    import numpy as np
    import torch

# A vocabulary of 256,000 tokens with scores, types and merges has about a million; the format has 4 dimensions.
MOST_ARRAY_ITEMS, MOST_DIMENSIONS = 1 << 22, 8

SUPPORTED = ("F32", "F16", "BF16", *block_types())

# For a file of which no model can be built: what needs none.
WITHOUT_A_CLASS = (
    "a recipe that runs no model makes another GGUF file of it: outlierq quantize FILE -r gguf-q8_0 -o out.gguf, with "
    "--set quantize.type=Q4_K and so on; for everything else use the original Hugging Face folder of this model"
)

# Rows are dequantized in runs of about this many values: 64 MiB of float32, small beside any block of a large model.
VALUES_PER_RUN = 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. type: ggml type name ("Q4_K"). shape: row-major (GGUF itself writes it reversed).

    start: offset of its first byte in the file. row_bytes: stored bytes of one row of the last dimension, 0 of a type
    that is not known; its nbytes then reach to the next tensor. number: ggml's of the type. path: the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    row_bytes: int
    number: int
    path: Path


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensor bytes, `data_start` of them. fields: metadata by key, arrays left out.

    path: the file, of a split one the first. keys: where each key and its value lie in it, [start, end). version: of
    the format. alignment: of tensors, in bytes. parts: all files.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int
    keys: dict[str, tuple[int, int]]
    version: int
    alignment: int
    parts: tuple[Path, ...]


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and tensor headers of one file; SourceError when it is not GGUF, damaged or cut off."""
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
        keys, version = _key_spans(reader), int(reader.fields["GGUF.version"].contents())
        entries, byte_order, data_start = reader.entries, reader.byte_order, int(reader.data_offset)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise SourceError(f"the header of {path.name} cannot be read: {error}", hint=AGAIN) from error
    if byte_order != "I":
        raise SourceError(f"{path.name} is a big-endian GGUF file", hint="convert it to little-endian")
    tensors = {entry[0]: _tensor(path, *entry) for entry in _with_ends(path, entries)}
    _check_bounds(path, tensors, data_start)
    return GgufHeader(path, fields, tensors, data_start, keys, version, int(reader.alignment), (path,))


def _key_spans(reader: Any) -> dict[str, tuple[int, int]]:
    """[start, end) of each key with its value, as the file has them one behind the other."""
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    ends = [field.offset for field in fields[1:]] + [reader.keys_end]
    return {field.name: (int(field.offset), int(end)) for field, end in zip(fields, ends, strict=True)}


def _with_ends(path: Path, entries: list[tuple[str, int, tuple[int, ...], int]]) -> list[tuple[Any, ...]]:
    """The entries with the byte at which the next tensor, or the file, begins or ends."""
    starts = [*sorted(entry[3] for entry in entries), path.stat().st_size]
    following = dict(pairwise(starts))
    return [(*entry, following[entry[3]]) for entry in entries]


def _headers_only() -> type:
    """gguf's reader, kept from touching tensor bytes (and from failing without figures where they are missing).

    It also steps over arrays: a vocabulary is hundreds of thousands of strings, seconds of parsing for nothing here.
    """
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class HeaderReader(GGUFReader):
        entries: list[tuple[str, int, tuple[int, ...], int]]
        items, keys_end = 0, 0

        def _build_tensor_info(self, offs: int, all_tensor_count: int) -> tuple[int, list]:
            self.keys_end = offs
            return super()._build_tensor_info(offs, all_tensor_count)

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


def _tensor(path: Path, name: str, kind: int, shape: tuple[int, ...], start: int, following: int) -> GgufTensor:
    """One header, refused when its rows do not hold whole blocks. following: where the next tensor begins."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = next((known for known in GGMLQuantizationType if known == kind), None)
    if known is None:
        return GgufTensor(name, f"number {kind}", shape, start, max(following - start, 0), 0, kind, path)
    block, block_bytes = GGML_QUANT_SIZES[known]
    if not 1 <= len(shape) <= MOST_DIMENSIONS or min(shape) < 1 or shape[-1] % block:
        raise SourceError(
            f"tensor {name} in {path.name}: rows of shape {brief(shape)} are no multiple of {block} values"
        )
    row_bytes = shape[-1] // block * block_bytes
    return GgufTensor(name, known.name, shape, start, prod(shape[:-1]) * row_bytes, row_bytes, kind, path)


def check_decodable(tensor: GgufTensor) -> None:
    """SourceError for a type whose blocks are not read here, or a tensor without values; it can only be carried."""
    if tensor.type not in SUPPORTED:
        raise SourceError(
            f"tensor {tensor.name} in {tensor.path.name} has type {tensor.type}, which is not supported "
            f"(supported: {', '.join(SUPPORTED)})",
            hint="take a file of a supported type; the less compressed, the better the result",
        )
    if not tensor.shape or not all(tensor.shape):
        raise SourceError(
            f"tensor {tensor.name} in {tensor.path.name} has the shape {list(tensor.shape)}: it holds no numbers",
            hint="make the file again; llama.cpp's converter writes no such tensor",
        )


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


def dequantized(tensor: GgufTensor, dtype: torch.dtype, digests: dict[str, str] | None = None) -> torch.Tensor:
    """The values in `dtype`, in the shape of the header; exact float32 values are computed run by run, rounded once.

    digests: gets the XXH3-128 of the tensor's bytes. SourceError for a type that is not read here.
    """
    import torch

    check_decodable(tensor)
    rows = prod(tensor.shape[:-1])
    values = torch.empty((rows, tensor.shape[-1]), dtype=dtype)
    first = 0
    for piece in dequantized_rows(tensor, max(1, VALUES_PER_RUN // tensor.shape[-1]), digests):
        values[first : first + len(piece)] = piece
        first += len(piece)
    return values.reshape(tensor.shape)


def dequantized_rows(tensor: GgufTensor, count: int, digests: dict[str, str] | None = None) -> Iterator[torch.Tensor]:
    """Float32 rows [<= count, in] of all but the last dimension, in order. digests: as above, after the last row."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    check_decodable(tensor)
    for raw in raw_rows(tensor, count, digests):
        plain = dequantize(raw.numpy().view(_plain_dtype(tensor.type)), GGMLQuantizationType[tensor.type])
        yield torch.from_numpy(np.ascontiguousarray(plain))


def some_rows(tensor: GgufTensor, first: int, count: int) -> torch.Tensor | None:
    """Float32 rows [count, in] from `first` on, of all matrices below each other; None of a type that is not read."""
    import torch

    if tensor.type not in SUPPORTED:
        return None
    start, nbytes = tensor.start + first * tensor.row_bytes, count * tensor.row_bytes
    part = replace(tensor, shape=(count, tensor.shape[-1]), start=start, nbytes=nbytes)
    return dequantized(part, torch.float32)


def raw_rows(tensor: GgufTensor, count: int, digests: dict[str, str] | None = None) -> Iterator[torch.Tensor]:
    """Uint8 rows [<= count, bytes of a row] as they are stored, in order; a type that is not known is one row.

    digests: as above, after the last row.
    """
    import torch
    import xxhash

    width = tensor.row_bytes or tensor.nbytes
    rows = tensor.nbytes // width if width else 0
    digest = xxhash.xxh3_128()
    with reading(tensor.path), tensor.path.open("rb", buffering=0) as file:
        for first in range(0, rows, count):
            raw = torch.empty((min(count, rows - first), width), dtype=torch.uint8)
            memory = memoryview(raw.numpy()).cast("B")
            read_exactly(file, tensor.start + first * width, memory, tensor.name, tensor.path)
            digest.update(memory)
            yield raw
    if digests is not None:
        digests.setdefault(tensor.name, digest.hexdigest())


def head_bytes(header: GgufHeader) -> Iterator[bytes]:
    """Everything before the tensors of the first part, in pieces of 1 MiB."""
    left = header.data_start
    with header.path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            left -= len(piece)
            yield piece


def _plain_dtype(type_name: str) -> str:
    """How gguf wants the bytes of a type: as numbers where numpy has them, as bytes otherwise."""
    return {"F32": "<f4", "F16": "<f2"}.get(type_name, "u1")
