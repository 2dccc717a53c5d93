"""Split GGUF files: parts NNNNN-of-NNNNN, as llama.cpp writes and reads them, are one header with many files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.load.gguf.file import GgufHeader, GgufTensor, read_gguf_header

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# The keys of a part: its number from 0, how many there are, and how many tensors all of them hold.
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
HINT = "put all parts of one model into one folder, under the names that they were published with"


def read_gguf(path: Path) -> GgufHeader:
    """Metadata and tensor headers of a file, or of all parts of a split one, any of which may be named.

    SourceError when a part is missing, cut off or of another model.
    """
    header = read_gguf_header(path)
    count = header.fields.get(COUNT, 1)
    if not isinstance(count, int) or count < 1:
        raise SourceError(f"{path.name} is one of {count!r} parts of a GGUF file, which is no number", hint=HINT)
    if count == 1:
        return header
    headers = [read_gguf_header(part) for part in _parts(path, count)]
    for number, part in enumerate(headers):
        _check_part(part, number, headers[0])
    tensors = _together(headers)
    _check_sizes(headers[0], tensors)
    return replace(headers[0], tensors=tensors, parts=tuple(part.path for part in headers))


def _parts(path: Path, count: int) -> list[Path]:
    """The files of all parts, beside `path`."""
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise SourceError(
            f"{path.name} is one of {count} parts of a GGUF file, and is not named so",
            hint=f"name the parts NAME-00001-of-{count:05d}.gguf and so on, or join them: llama-gguf-split --merge",
        )
    files = [path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceError(
            f"{path.name} is one of {count} parts of a GGUF file, and {len(missing)} of them are not there, first "
            f"{missing[0]}",
            hint=HINT,
        )
    return files


def _check_part(part: GgufHeader, number: int, first: GgufHeader) -> None:
    """SourceError when a part is not the one that its name says, or not of the same split as the first."""
    said = tuple(part.fields.get(key) for key in (NUMBER, COUNT, TENSORS))
    meant = (number, first.fields.get(COUNT), first.fields.get(TENSORS))
    if said != meant:
        raise SourceError(
            f"{part.path.name} says that it is part {_text(said)}; by its name and {first.path.name} it would be part "
            f"{_text(meant)}",
            hint=HINT,
        )


def _text(said: tuple[Any, ...]) -> str:
    """Number, count and tensors as people say them."""
    number, count, tensors = said
    return f"{number + 1 if isinstance(number, int) else number} of {count} with {tensors} tensors in all"


def _together(headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    """The tensors of all parts, in order; SourceError when they are not as many as they should be."""
    tensors: dict[str, GgufTensor] = {}
    for part in headers:
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            name = min(twice)
            raise SourceError(f"{part.path.name} and {tensors[name].path.name} both hold tensor {name}", hint=HINT)
        tensors |= part.tensors
    total = headers[0].fields.get(TENSORS)
    if total != len(tensors):
        raise SourceError(
            f"the {len(headers)} parts of {headers[0].path.name} hold {len(tensors)} tensors, and should hold {total}",
            hint=HINT,
        )
    return tensors


def _check_sizes(first: GgufHeader, tensors: dict[str, GgufTensor]) -> None:
    """SourceError when a part is of a model of another width than the metadata say: gains of blocks have that width."""
    width = first.fields.get(f"{first.fields.get('general.architecture')}.embedding_length")
    for tensor in tensors.values():
        if tensor.name.endswith(("attn_norm.weight", "ffn_norm.weight")) and tensor.shape[-1] != width:
            raise SourceError(
                f"tensor {tensor.name} in {tensor.path.name} has {tensor.shape[-1]} values, and the model of "
                f"{first.path.name} is {width} wide: the part is of another model",
                hint=HINT,
            )
