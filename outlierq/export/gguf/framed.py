"""The header of a GGUF file in the frame of another one: keys byte for byte, tensors in its order, with new types."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from outlierq.core.model import Frame, FrameTensor

UINT32 = 4  # gguf's number of this type of a value
FILE_TYPE, QUANTIZATION_VERSION = "general.file_type", "general.quantization_version"


def framed_header(frame: Frame, tensors: Sequence[tuple[FrameTensor, int]], file_type: int | None) -> bytes:
    """The bytes before the first tensor, padded. tensors: in file order, with the bytes of each.

    file_type: llama.cpp's number of the mix or of the type of most weights, None where nothing is packed.
    """
    keys = dict(frame.keys)
    if file_type is not None:
        keys[FILE_TYPE] = _number(FILE_TYPE, file_type)
        keys.setdefault(QUANTIZATION_VERSION, _number(QUANTIZATION_VERSION, 2))
    infos, offset = [], 0
    for tensor, nbytes in tensors:
        infos.append(_info(tensor, offset))
        offset += nbytes + -nbytes % frame.alignment
    counts = struct.pack("<4sIQQ", b"GGUF", frame.version, len(infos), len(keys))
    header = b"".join((counts, *keys.values(), *infos))
    return header + b"\0" * (-len(header) % frame.alignment)


def _number(key: str, value: int) -> bytes:
    """A key with a number."""
    return _text(key) + struct.pack("<II", UINT32, value)


def _info(tensor: FrameTensor, offset: int) -> bytes:
    """The header of one tensor. offset: from the first one on."""
    shape = tensor.shape[::-1]
    return _text(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.number, offset)


def _text(text: str) -> bytes:
    """A text with its length."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
