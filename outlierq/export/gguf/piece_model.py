"""tokenizer.model, as SentencePiece writes it: the vocabulary for a GGUF file where there is no tokenizer.json.

The file is a protocol buffer (sentencepiece_model.proto). Of its messages a few fields are needed, and llama.cpp's way
of joining pieces is SentencePiece's own: Kudo and Richardson 2018, arXiv:1808.06226.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.export.gguf.architectures import LIKE
from outlierq.export.gguf.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    Pieces,
    check_pieces,
    few,
    padding,
)

# Numbers of the fields that are read, by message.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, SPACE_AS_SUFFIX, UNKNOWN_ID, BEGIN_ID, END_ID, PADDING_ID = 3, 24, 40, 41, 42, 43
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_SPACES = 2, 3, 4
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
IDS = {"unk": (UNKNOWN_ID, 0), "bos": (BEGIN_ID, 1), "eos": (END_ID, 2), "pad": (PADDING_ID, -1)}  # field, default
KINDS = range(NORMAL, BYTE + 1)
VARINT, EIGHT_BYTES, SIZED, FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class _Piece:
    """One piece of the file. kind: SentencePiece's number, which is ggml's."""

    text: str
    score: float
    kind: int


def pieces_of_model(
    raw: bytes, size: int, settings: Mapping[str, Any], added: Mapping[str, int]
) -> tuple[Pieces, dict[str, int]]:
    """The vocabulary, filled up with unused pieces to `size`, and the ids of unk, bos, eos and pad.

    settings: the content of tokenizer_config.json. added: that of added_tokens.json. SourceError for models that are
    not BPE, and where llama.cpp would split text in another way throughout.
    """
    fields = list(_fields(raw))
    trainer, normalizer = (_last(fields, number) for number in (TRAINER, NORMALIZER))
    _check(trainer, normalizer)
    tokens, scores, types = padding(size)
    own = [_piece(value) for number, value in fields if number == PIECES]
    for number, piece in enumerate(own[:size]):
        tokens[number], scores[number], types[number] = piece.text, piece.score, piece.kind
        if piece.kind == USER_DEFINED and not piece.text.strip(piece.text[:1]):
            # A run of one character, mostly spaces, is a piece like others, but before them and the longest first.
            types[number], scores[number] = NORMAL, float(len(piece.text))
        elif piece.kind == USER_DEFINED:  # found in the text before spaces are written in another way
            tokens[number] = piece.text.replace(SPACE, " ")
    for number, text, control in _added(settings, added):
        if number < size and types[number] in (NORMAL, UNUSED, USER_DEFINED):
            tokens[number], types[number] = text, CONTROL if control else USER_DEFINED
    check_pieces(tokens, types)
    said = []
    if normalizer.get(REMOVE_SPACES, 1):
        said.append("SentencePiece takes repeated spaces and those at the ends away; llama.cpp does not")
    whole = [piece.text for piece, kind in zip(own, types, strict=False) if kind == USER_DEFINED == piece.kind]
    if whole and normalizer.get(DUMMY_PREFIX, 1):
        said.append(
            f"{few(whole)}: llama.cpp puts a space before text behind it, and none before it; SentencePiece not"
        )
    unused = [piece.text for piece in own if piece.kind == UNUSED]
    if unused:
        said.append(f"{few(unused)}: not used by SentencePiece, but by llama.cpp")
    # A negative int32 is written as the uint64 of the same bits.
    numbers = {name: trainer.get(number, default) for name, (number, default) in IDS.items()}
    special = {name: number for name, number in numbers.items() if 0 <= number < min(size, len(own))}
    ends = (settings.get("add_bos_token") is not False, settings.get("add_eos_token") is True)
    return Pieces(tokens, scores, types, bool(normalizer.get(DUMMY_PREFIX, 1)), ends, tuple(said)), special


def _check(trainer: Mapping[int, Any], normalizer: Mapping[int, Any]) -> None:
    """SourceError for a model that llama.cpp would use in another way."""
    kind = trainer.get(MODEL_TYPE, 1)
    if kind != 2:
        raise SourceError(
            f"the tokenizer is a {MODEL_TYPES.get(kind, kind)} model of SentencePiece; GGUF files get BPE models only",
            hint=LIKE,
        )
    if normalizer.get(CHARACTER_MAP):
        raise SourceError("the tokenizer maps characters to others, which llama.cpp does not do for BPE", hint=LIKE)
    if trainer.get(SPACE_AS_SUFFIX):
        raise SourceError("the tokenizer puts spaces behind words, which llama.cpp does not do for BPE", hint=LIKE)


def _added(settings: Mapping[str, Any], added: Mapping[str, int]) -> Iterator[tuple[int, str, bool]]:
    """(id, text, whether it is special) of the tokens that transformers adds."""
    for text, number in added.items():
        yield number, text, False
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        yield int(number), token["content"], bool(token.get("special"))


def _piece(raw: bytes) -> _Piece:
    """A message of a piece."""
    fields = dict(_fields(raw))
    text, score, kind = fields[TEXT].decode(), fields.get(SCORE, bytes(4)), fields.get(TYPE, NORMAL)
    if len(score) != 4 or kind not in KINDS:
        raise ValueError(f"the piece {text!r} has a score of {len(score)} bytes and the type {kind!r}")
    (number,) = struct.unpack("<f", score)
    return _Piece(text, number, kind)


def _last(fields: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    """The fields of a message that stands once, if at all."""
    return next((dict(_fields(value)) for key, value in reversed(fields) if key == number), {})


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field: an int, or bytes. ValueError where the bytes are no protocol buffer."""
    place = 0
    while place < len(raw):
        key, place = _varint(raw, place)
        kind = key & 7
        value: int | bytes
        if kind == VARINT:
            value, place = _varint(raw, place)
        else:
            length = {EIGHT_BYTES: 8, FOUR_BYTES: 4}.get(kind)
            if kind == SIZED:
                length, place = _varint(raw, place)
            if length is None or place + length > len(raw):
                raise ValueError(f"byte {place} of {len(raw)} belongs to no field")
            value, place = raw[place : place + length], place + length
        yield key >> 3, value


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits per byte, lowest first, and the place behind it."""
    for count in range(10):
        if place + count >= len(raw):
            break
        if raw[place + count] < 128:
            digits = raw[place : place + count + 1]
            return sum((digit & 127) << 7 * power for power, digit in enumerate(digits)), place + count + 1
    raise ValueError(f"byte {place} of {len(raw)} begins no number")
