"""What llama.cpp makes of text with a "llama" vocabulary (its SPM tokenizer), step by step, from a file's metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import inf
from typing import Any

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "\u2581"


def token_ids_of(fields: Mapping[str, Any]) -> Callable[[str], list[int]]:
    """A function from a text, in which special tokens are understood, to ids. fields: the file's metadata by key."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    number = {token: place for place, token in enumerate(tokens)}
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    whole.sort(key=lambda token: -len(token.encode()))
    before = " " if fields["tokenizer.ggml.add_space_prefix"] else ""
    begin = [fields["tokenizer.ggml.bos_token_id"]] if fields["tokenizer.ggml.add_bos_token"] else []
    end = [fields["tokenizer.ggml.eos_token_id"]] if fields["tokenizer.ggml.add_eos_token"] else []

    def token_ids(text: str) -> list[int]:
        found: list[int] = []
        for part, special in _cut(text, whole):
            if special:
                found.append(number[part])
                continue
            for piece in joined((before + part).replace(" ", SPACE), scores):
                found += [number[piece]] if piece in number else [number[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return begin + found + end

    return token_ids


def _cut(text: str, whole: list[str]) -> list[tuple[str, bool]]:
    """The text with every token that is found whole, the longest first, and whether a part is such a token."""
    parts = [(text, False)] if text else []
    for token in whole:
        cut = []
        for part, special in parts:
            if special:
                cut.append((part, True))
                continue
            between = part.split(token)
            cut += [(between[0], False)]
            for later in between[1:]:
                cut += [(token, True), (later, False)]
        parts = [(part, special) for part, special in cut if part]
    return parts


def joined(text: str, scores: Mapping[str, float]) -> list[str]:
    """Characters, of which the neighbours whose text has the highest score are joined until none has one."""
    parts = list(text)
    worth = [scores.get(left + right, -inf) for left, right in pairwise(parts)]
    while worth and (best := max(worth)) > -inf:
        place = worth.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        del worth[place]
        for beside in range(max(place - 1, 0), min(place + 1, len(worth))):
            worth[beside] = scores.get(parts[beside] + parts[beside + 1], -inf)
    return parts
