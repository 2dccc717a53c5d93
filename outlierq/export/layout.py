"""Where every output tensor will lie: shards, headers and offsets, known from shapes alone.

The plan and the writer use the same layout, so the planned size is the written size, to the byte. `kernels/layout.py`
and `runtime/layout.py` are about the order of codes in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written. dtype: safetensors name. unit: the unit of work that produces it ("block-00003")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its shard file and the absolute offset of its first byte."""

    tensor: OutputTensor
    shard: str
    offset: int


@dataclass(frozen=True)
class Layout:
    """places: by tensor name, in file order. headers: the first bytes of each shard. sizes: bytes of each shard.

    notes: what of the source they do not hold, as sentences.
    """

    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def index(self) -> bytes | None:
        """Content of model.safetensors.index.json; None when one file holds everything."""
        if len(self.sizes) == 1:
            return None
        total = sum(place.tensor.nbytes for place in self.places.values())
        weight_map = {name: place.shard for name, place in self.places.items()}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        return (text + "\n").encode()

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards and the index."""
        return sum(self.sizes.values()) + len(self.index or b"")


def make_layout(tensors: Iterable[OutputTensor], max_shard_bytes: int) -> Layout:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[OutputTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for number, content in enumerate(map(_aligned, shards), 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        headers[name] = _header(content)
        offset = len(headers[name])
        for tensor in content:
            places[tensor.name] = Place(tensor, name, offset)
            offset += tensor.nbytes
        sizes[name] = offset
    return Layout(places, headers, sizes)


def _aligned(tensors: list[OutputTensor]) -> list[OutputTensor]:
    """The same tensors, those of odd length last, wide dtypes first: each then starts at a multiple of its width.

    A file may have no holes, and readers that map it cannot view bytes at an odd place as wider numbers.
    """
    odd = [tensor for tensor in tensors if tensor.nbytes % 8]
    even = [tensor for tensor in tensors if not tensor.nbytes % 8]
    return even + sorted(odd, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])


def _header(tensors: list[OutputTensor]) -> bytes:
    """The safetensors header: length as little-endian u64, then JSON, padded with spaces to 8 bytes.

    The safetensors library writes a file only from all its tensors at once; writing the header first is what lets a
    model of any size be written tensor by tensor.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
