"""SentencePiece vocabularies as llama.cpp's "llama" tokenizer reads them: pieces with scores and types.

llama.cpp joins, of all neighbours whose text together is a piece, those whose piece has the highest score, the leftmost
first; a character that is no piece becomes its bytes. A tokenizer.json lists the pairs that may be joined, by rank
(Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018, arXiv:1808.06226). What happens inside a stretch of
text before something is joined across its ends does not depend on the rest. So where a piece, given as a text of its
own, becomes that one piece, the last pair of that run is the only one that ever makes it: with minus the rank of that
pair as its score, llama.cpp joins the same pairs in the same order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from outlierq.core.errors import SourceError
from outlierq.export.gguf.architectures import LIKE

Rank = TypeVar("Rank", int, float)
SPACE = "\u2581"
# ggml's numbers, which are those of SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# Steps of a tokenizer.json that write a space as another character and put one before the text.
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
# Gemma cuts at spaces, of which none are left by then.
IDLE_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# transformers prepares text for these classes in its own way, whatever the file says, but not for models of Mistral.
REBUILT = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
AS_THE_FILE_SAYS = ("mistral",)
# Settings of the merges that llama.cpp does not know.
UNKNOWN_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
MOST_OTHERS = 0.01  # of all pieces: more that llama.cpp joins in another way, and every text is likely to change


@dataclass(frozen=True)
class Pieces:
    """A vocabulary by token id. types: ggml's numbers. space_prefix: whether a space is put before text.

    ends: whether a begin and an end of text are put around it. differences: sentences on text that llama.cpp splits in
    another way than transformers.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    space_prefix: bool
    ends: tuple[bool, bool]
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Spaces:
    """What becomes of spaces. prefix: one is put before text. doubled: also where text begins with one.

    always: also behind a special token. cut: text is cut before every space. llama.cpp cuts nothing, and where it puts
    a space, it does so doubled and always.
    """

    prefix: bool
    doubled: bool = True
    always: bool = True
    cut: bool = False


def is_sentencepiece(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json describes merges of characters, with bytes for unknown ones."""
    model = tokenizer.get("model") or {}
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def pieces_of(
    tokenizer: Mapping[str, Any], size: int, settings: Mapping[str, Any], special: Mapping[str, int]
) -> Pieces:
    """The vocabulary of a tokenizer.json, filled up with unused pieces to `size`.

    settings: the content of tokenizer_config.json, and the model_type. special: the ids of "bos" and "eos". SourceError
    where llama.cpp would split text in another way throughout.
    """
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
    spaces, merges = _spaces(tokenizer, settings), _merges(model)
    ranks = _ranks(merges)
    tokens, scores, types = padding(size, -float(len(merges)))
    for text, number in model["vocab"].items():
        if 0 <= number < size:
            tokens[number], scores[number] = text, -float(ranks.get(text, len(merges)))
            types[number] = BYTE if BYTE_PIECE.fullmatch(text) else NORMAL
    for entry in added:
        text, number = entry["content"], entry["id"]
        # A run of spaces that merges make stays a piece like others: found whole, it would be printed as it is written.
        if 0 <= number < size and (entry["special"] or SPACE not in text or text not in ranks):
            tokens[number] = text if entry["special"] else text.replace(SPACE, " ")
            types[number] = CONTROL if entry["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token") or settings.get("unk_token"), size)
    if unknown < size:
        types[unknown] = UNKNOWN
    check_pieces(tokens, types)
    begin, end, said = _ends(tokenizer, special)
    said += _about_spaces(spaces) + _about_added(tokenizer, spaces, size)
    said += _about_merges(model, merges, dict(zip(tokens, scores, strict=True)), types, spaces)
    return Pieces(tokens, scores, types, spaces.prefix, (begin, end), tuple(said))


def padding(size: int, score: float = -10000.0) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types of pieces that nothing uses, for rows of the embedding that have no other."""
    return [f"[PAD{number}]" for number in range(size)], [score] * size, [UNUSED] * size


def _merges(model: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """Pair -> rank. SourceError for settings that llama.cpp does not know."""
    for key in UNKNOWN_SETTINGS:
        if model.get(key):
            raise SourceError(f"the tokenizer has {key} {model[key]!r}, which llama.cpp does not know", hint=LIKE)
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(model.get("merges") or []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge  # older files have one text
        if not {left, right, left + right} <= model["vocab"].keys():
            raise SourceError(f"the tokenizer merges {left!r} and {right!r}, which are not all in its vocabulary")
        ranks[left, right] = rank
    return ranks


def _ranks(merges: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """Piece -> rank of the pair that makes it; which one of several that is, only the merges themselves can say."""
    made: dict[str, list[int]] = {}
    for (left, right), rank in merges.items():
        made.setdefault(left + right, []).append(rank)
    ranks = {}
    for text, own in made.items():
        together = max(own) - min(own) == len(own) - 1  # no other piece can come between
        parts, last = ([], None) if together else _joined(text, lambda left, right: merges.get((left, right)))
        ranks[text] = last if last is not None and parts == [text] else min(own)
    return ranks


def _joined(text: str, rank: Callable[[str, str], Rank | None]) -> tuple[list[str], Rank | None]:
    """The text as pieces, after joining neighbours of the lowest rank, the leftmost first; and the last rank."""
    parts: list[str] = list(text)
    last: Rank | None = None
    while True:
        ranked = [
            (own, place) for place in range(len(parts) - 1) if (own := rank(*parts[place : place + 2])) is not None
        ]
        if not ranked:
            return parts, last
        last, place = min(ranked)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def _spaces(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> _Spaces:
    """How text is prepared; SourceError for a step that llama.cpp does not do."""
    if settings.get("tokenizer_class") in REBUILT and settings.get("model_type") not in AS_THE_FILE_SAYS:
        prefix = settings.get("add_prefix_space") is not False
        return _Spaces(prefix, doubled=False, always=bool(settings.get("legacy", False)))
    normalizers, splitters = _listed(tokenizer, "normalizer"), _listed(tokenizer, "pre_tokenizer")
    replaced, spaces = REPLACE in normalizers, _Spaces(PREPEND in normalizers)
    left = [step for step in normalizers if step not in (REPLACE, PREPEND)]
    for step in splitters:
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            cut, replaced = bool(step.get("split", True)), True
            plain = spaces.prefix or scheme == "never"  # Metaspace puts no space before one
            spaces = _Spaces(spaces.prefix, cut=cut) if plain else _Spaces(True, False, scheme == "always", cut)
        elif not (replaced and step == IDLE_SPLIT):
            left.append(step)
    if left or not replaced:
        named = ", ".join(sorted({str(step.get("type")) for step in left})) or "it keeps spaces"
        raise SourceError(
            f"the tokenizer prepares text in a way that llama.cpp has only without SentencePiece: {named}",
            hint=LIKE,
        )
    return spaces


def _listed(tokenizer: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor: none, one or a sequence."""
    step = tokenizer.get(part)
    parts = ("normalizers", "pretokenizers", "processors")
    return [] if step is None else next((list(step[name]) for name in parts if name in step), [step])


def check_pieces(tokens: list[str], types: list[int]) -> None:
    """SourceError where llama.cpp would stop: without a piece for every byte, or with two pieces of one text."""
    missing = 256 - len({token for token, kind in zip(tokens, types, strict=True) if kind == BYTE})
    if missing:
        raise SourceError(
            f"the tokenizer has no pieces for {missing} of the 256 bytes, with which llama.cpp spells characters that "
            "are none; without them it stops there",
            hint=LIKE,
        )
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise SourceError(
            f"the tokenizer has two tokens {twice!r}, which llama.cpp refuses",
            hint="write another format: --set export.format=compressed-tensors",
        )


def _ends(tokenizer: Mapping[str, Any], special: Mapping[str, int]) -> tuple[bool, bool, list[str]]:
    """Whether a begin and an end of text are added, and a sentence where other tokens are added, too.

    transformers takes this from tokenizer.json alone; `add_bos_token` in the settings is for older ones.
    """
    ends: tuple[list[int], list[int]] = ([], [])
    for step in _listed(tokenizer, "post_processor"):
        side = 0
        for part in (step.get("single") or []) if step.get("type") == "TemplateProcessing" else []:
            if "SpecialToken" in part:
                ends[side].extend(step["special_tokens"][part["SpecialToken"]["id"]]["ids"])
            else:
                side = 1
    before, behind = ([special.get(name)] == ids for name, ids in zip(("bos", "eos"), ends, strict=True))
    if (ends[0] and not before) or (ends[1] and not behind):
        return (
            before,
            behind,
            [f"transformers puts the tokens {ends[0]} before text and {ends[1]} behind it; llama.cpp not"],
        )
    return before, behind, []


def _about_spaces(spaces: _Spaces) -> list[str]:
    """Where llama.cpp adds a space and transformers does not."""
    if not spaces.prefix or spaces.doubled:
        return []
    where = "" if spaces.always else ", and before text behind a special token"
    return [f"llama.cpp puts a space before text that begins with a space{where}; transformers does not"]


def _about_added(tokenizer: Mapping[str, Any], spaces: _Spaces, size: int) -> list[str]:
    """Added tokens with properties that llama.cpp does not know."""
    added = tokenizer.get("added_tokens") or []
    said = []
    greedy = [entry["content"] for entry in added if any(entry.get(key) for key in ("lstrip", "rstrip", "single_word"))]
    if greedy:
        said.append(f"{few(greedy)}: in transformers it takes spaces beside it, or must be a word; in llama.cpp not")
    prepared = [
        entry["content"] for entry in added if entry.get("normalized") and PREPEND in _listed(tokenizer, "normalizer")
    ]
    if prepared and spaces.doubled:
        said.append(f"{few(prepared)}: transformers finds it behind a space only; llama.cpp everywhere")
    beyond = [entry["content"] for entry in added if entry["id"] >= size]
    if beyond:
        said.append(f"{few(beyond)}: without a row in the embedding, left out")
    return said


def _about_merges(
    model: Mapping[str, Any],
    merges: Mapping[tuple[str, str], int],
    scores: Mapping[str, float],
    types: list[int],
    spaces: _Spaces,
) -> list[str]:
    """Pieces that llama.cpp would make and transformers never makes; SourceError when they are many."""
    from tokenizers import Tokenizer, models

    vocabulary, pairs = model["vocab"], sorted(merges, key=merges.__getitem__)
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, unk_token=model.get("unk_token")))
    tried = [text for text, kind in zip(scores, types, strict=True) if kind in (NORMAL, UNUSED, BYTE) and len(text) > 1]
    encodings = [encoded.tokens for encoded in bare.encode_batch(tried, add_special_tokens=False)]
    others = []
    for text, parts in zip(tried, encodings, strict=True):
        apart = parts != [text] or (spaces.cut and SPACE in text[1:])
        if apart and _joined(text, lambda left, right: _cost(left + right, scores))[0] == [text]:
            others.append(text)
    if len(others) > MOST_OTHERS * len(tried):
        raise SourceError(
            f"llama.cpp would join {len(others)} pieces that transformers never makes of this tokenizer, such as "
            f"{others[0]!r}",
            hint=LIKE,
        )
    return [f"{few(others)}: a piece that llama.cpp makes of text, and transformers never does"] if others else []


def _cost(text: str, scores: Mapping[str, float]) -> float | None:
    """Minus the score of a piece, None when the text is none."""
    return -scores[text] if text in scores else None


def few(texts: list[str]) -> str:
    """The first one, and how many more."""
    return f"{texts[0]!r}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")
