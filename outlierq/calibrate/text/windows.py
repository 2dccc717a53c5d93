"""Calibration text: sources of documents become token windows of one length, the same ones for the same settings."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.text.chats import SHAPES, chat_columns, messages_of, rendered
from outlierq.calibrate.text.embedded import MIX, TITLES, documents, embedded_text
from outlierq.calibrate.text.files import MOST_BYTES, Columns, Row, file_rows, file_text, has_rows
from outlierq.core.errors import StatsError, during, nearest
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.untrusted import brief
from outlierq.core.masking import hidden_at_random
from outlierq.core.measured.block_stats import MASS_COLUMNS
from outlierq.core.notes import collecting, note
from outlierq.core.windows import begun, opening_tokens, room_beside
from outlierq.recipe.sections import SELF

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.text.unseen import Unseen

    OwnText = Callable[[int, int], torch.Tensor]  # windows and their length -> [windows, length]

DELIMITERS = frozenset(".,;:!?\n")  # tokens made of these are where attention sinks are found (arXiv:2402.17762)
# Among documents, a seeded choice looks at this many times the windows wanted: large sources are not read to the end.
POOL_FACTOR = 8
# Tokenizing one long string takes some 150 bytes of memory a character, so long texts go in pieces, a few at a time.
PIECE_CHARACTERS = 1 << 15
DOCUMENTS_AT_A_TIME = 16
# Windows of LEAST_JUDGED tokens and more can be judged. Nothing that a model reads has less than LEAST_DIFFERENT kinds
# of tokens (DNA has four letters), and statistics of less know next to no directions. Less than FEW_DIFFERENT in a
# whole source is less than letters, figures and punctuation, which even a tokenizer of bytes tells apart.
LEAST_JUDGED = 32
LEAST_DIFFERENT = 4
FEW_DIFFERENT = 64
FEW_JUDGED = 1024
HIDDEN = ", a random share of each window hidden behind the mask token"


@dataclass(frozen=True)
class TokenSet:
    """Token windows. ids: LongTensor [samples, sequence_length]. fingerprint: sha256 hex of ids and settings.

    notes: what was left out of the text, or is unusual about it. inputs: what the model gets beside the tokens of each
    window, by argument (`calibrate/text/images.py`); empty where no window has an image. masked: whether tokens are
    hidden, as masked-diffusion models read a text. unseen: tokens that no window holds, where they were asked for.
    """

    ids: torch.Tensor
    fingerprint: str
    description: str
    notes: tuple[str, ...] = ()
    inputs: tuple[Mapping[str, torch.Tensor], ...] = ()
    masked: bool = False
    unseen: Unseen | None = None

    def hidden_behind(self, token: int, opening: int, seed: int | None) -> TokenSet:
        """The same with a random share of every window hidden behind a mask token (`core.masking`)."""
        ids = hidden_at_random(self.ids, token, opening, seed).over(self.ids)
        digest = hashlib.sha256(self.fingerprint.encode() + ids.numpy().tobytes()).hexdigest()
        return replace(self, ids=ids, fingerprint=digest, description=f"{self.description}{HIDDEN}", masked=True)

    @property
    def summary(self) -> str:
        """The description, and what is mixed in."""
        return self.description if self.unseen is None else f"{self.description}; {self.unseen}"


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a file, a data set of the Hub, or a text that is always at hand.

    path: a text file (one stream of text), one of rows (.jsonl, .json, .csv, .parquet, ...: one document a row), or
    "mix" or "embedded" (`embedded.py`), or "self" for text that the model writes. dataset: a Hub id, with its `config`.
    column: what holds the text of a row, default "text" (for chats, the columns that `chat_columns` knows, if there are
    any). split: of the data set (default "train"), or "calibration" / "evaluation" of the mix and of the embedded text.
    weight: share of the samples, relative to the other sources.
    """

    path: str | None = None
    dataset: str | None = None
    column: str | None = None
    weight: float = 1.0
    split: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise StatsError(f"a text source needs either `path` or `dataset`, got {self.path!r} and {self.dataset!r}")
        if not self.weight > 0:
            raise StatsError(f"the weight of {self.name} is {self.weight}; it must be above 0")

    @property
    def name(self) -> str:
        """How the source is called in messages and reports: without folders, which differ between machines."""
        if self.path == SELF:
            return "what the model writes"
        if self.path in TITLES:
            return f"{TITLES[self.path]} ({self.split or 'calibration'} part)"
        if self.path is not None:
            return Path(self.path).name
        return " ".join(part for part in (self.dataset, self.config, self.split) if part)

    @property
    def has_rows(self) -> bool:
        """Whether it is made of documents, not of one stream of text."""
        return self.path in (None, MIX) or has_rows(self.path)


def token_windows(
    tokenizer: Any,
    sources: str | Sequence[str | Mapping[str, Any] | TextSource],
    *,
    samples: int,
    sequence_length: int,
    seed: int | None,
    chat_template: bool = False,
    own: OwnText | None = None,
) -> TokenSet:
    """`samples` windows of `sequence_length` tokens, which do not overlap, shared out to the sources by weight.

    Documents are joined to one stream and cut. seed: chooses among the windows (of the mix, whose every stretch is a
    fair one, where to begin); None takes the first ones in order. chat_template: documents are rendered as chats (their
    messages, or their text as one user turn). Each window begins with what the tokenizer puts before a text by itself
    (a bos token). own: windows that the model writes, for sources of its own text. StatsError when the text cannot be
    read, is too short, or says next to nothing.
    """
    import torch

    listed = [_as_source(entry) for entry in ([sources] if isinstance(sources, str) else sources)]
    if not listed or samples < 1 or sequence_length < 2:
        raise StatsError(
            f"calibration needs sources, samples and tokens, got {len(listed)}, {samples} and {sequence_length}"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    opening = opening_tokens(tokenizer)
    parts = []
    with collecting() as notes:
        for source, count in zip(listed, shares(samples, [source.weight for source in listed]), strict=True):
            with during("calibrate", source.name):
                if source.path == SELF:
                    parts.append(_own_windows(own, tokenizer, count, sequence_length, chat_template))
                    continue
                parts.append(_windows(tokenizer, source, count, sequence_length, generator, opening, chat_template))
    ids = torch.cat(parts)
    settings = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "chat_template": chat_template}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + ids.numpy().tobytes()).hexdigest()
    names = " + ".join(source.name for source in listed)
    form = "chats" if chat_template else "text"
    return TokenSet(ids, digest, f"{samples} x {sequence_length} tokens of {form}: {names}", tuple(notes))


def whole_text(path: str) -> str:
    """The text of a file, that of rows with blank lines between them; StatsError when it cannot be read as text."""
    source = TextSource(path=path)
    if not source.has_rows:
        return file_text(path)
    texts, room = [], MOST_BYTES
    for text in _documents(source, None, Counter()):
        texts.append(text)
        room -= len(text)
        if room < 0:
            break
    return "\n\n".join(texts)


def token_classes(tokenizer: Any, ids: torch.Tensor) -> torch.Tensor:
    """The class of every token [sequences, tokens] as its column in `MASS_COLUMNS`, uint8.

    The first position of a sequence; special tokens; tokens of nothing but . , ; : ! ? newlines and spaces around
    them; the rest.
    """
    import torch

    first, special, delimiter, rest = range(len(MASS_COLUMNS))
    known, special_ids = ids.unique(), frozenset(tokenizer.all_special_ids)
    by_token = torch.full((int(known.max()) + 1,), rest, dtype=torch.uint8)
    for token in known.tolist():
        text = tokenizer.decode([token]).strip(" ")
        if token in special_ids:
            by_token[token] = special
        elif text and DELIMITERS.issuperset(text):
            by_token[token] = delimiter
    classes = by_token[ids]
    classes[:, 0] = first
    return classes


def shares(samples: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of `samples` by weight; what rounding leaves goes to the largest remainders, earlier ones first."""
    exact = [samples * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    return counts


def _as_source(entry: str | Mapping[str, Any] | TextSource) -> TextSource:
    """A source as the recipe has it: a word or a path, or its keys."""
    if isinstance(entry, TextSource):
        return entry
    if isinstance(entry, str):
        return TextSource(path=entry)
    known = [field.name for field in fields(TextSource)]
    for key in entry:
        if key not in known:
            close = nearest(key, known)
            raise StatsError(f"unknown key {key!r} of a text source", hint=f"did you mean {close}?" if close else None)
    return TextSource(**entry)


def _windows(
    tokenizer: Any,
    source: TextSource,
    count: int,
    sequence_length: int,
    generator: torch.Generator | None,
    opening: Sequence[int],
    chat_template: bool,
) -> torch.Tensor:
    """[count, sequence_length] windows of one source."""
    import torch

    if count == 0:
        return torch.empty(0, sequence_length, dtype=torch.long)
    body = room_beside(opening, sequence_length)
    in_order = generator is None or source.path == MIX
    pool = count if in_order else POOL_FACTOR * count
    limit = pool * body if source.has_rows or in_order else None
    left_out: Counter[str] = Counter()
    begin = 0 if generator is None or source.path != MIX else int(torch.randint(1 << 30, (), generator=generator))
    stream = _token_stream(tokenizer, source, chat_template, left_out, begin)
    tokens = torch.tensor(list(islice(stream, limit)), dtype=torch.long)
    if left_out:
        note(f"{source.name}: left out: {', '.join(f'{what} ({n})' for what, n in sorted(left_out.items()))}")
    available = len(tokens) // body
    if available < count:
        raise StatsError(
            f"the text has {len(tokens)} tokens; {count} samples of {sequence_length} tokens need {count * body}",
            hint=f"use samples: {available}, a smaller sequence_length, or more text" if available else "use more text",
        )
    windows = tokens[: available * body].view(available, body)
    order = torch.arange(count) if in_order else torch.randperm(available, generator=generator)[:count]
    windows = windows[order]
    _judge(windows, tokenizer, source.name)
    return begun(windows, opening)


def _own_windows(
    own: OwnText | None, tokenizer: Any, count: int, sequence_length: int, chat_template: bool
) -> torch.Tensor:
    """[count, sequence_length] windows that the model writes."""
    import torch

    if own is None or chat_template:
        why = "is written as it comes, not as chats" if chat_template else "needs the model, and there is none here"
        raise StatsError(
            f"the text of a model's own {why}",
            hint="leave calibration.chat_template out" if chat_template else "give a file, or mix",
        )
    if not count:
        return torch.empty(0, sequence_length, dtype=torch.long)
    windows = own(count, sequence_length)
    _judge(windows, tokenizer, TextSource(path=SELF).name)
    return windows


def _judge(windows: torch.Tensor, tokenizer: Any, name: str) -> None:
    """Refuse windows [n, tokens] that say next to nothing, and note what looks like it."""
    import torch

    count, length = windows.shape
    if length < LEAST_JUDGED:
        return
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    different = torch.tensor([(~torch.isin(window.unique(), special)).sum() for window in windows])
    poor = int((different < LEAST_DIFFERENT).sum())
    said = f"{poor} of {count} windows of {length} tokens hold less than {LEAST_DIFFERENT} different tokens beside "
    said += "special ones"
    if 2 * poor > count:
        raise StatsError(said, hint="give text like that which the model will read")
    if poor:
        note(f"{name}: {said}")
    in_all = len(windows.unique())
    if in_all < FEW_DIFFERENT and windows.numel() >= FEW_JUDGED:
        note(f"{name}: there are only {in_all} different tokens among {windows.numel():,}")


def _token_stream(
    tokenizer: Any, source: TextSource, chat_template: bool, left_out: Counter[str], begin: int = 0
) -> Iterator[int]:
    """The tokens of all documents. Rows are separated by the eos token, chats by what their template writes.

    begin: document of the mix that is the first one; those before it come last.
    """
    eos = getattr(tokenizer, "eos_token_id", None)
    separator = eos if source.has_rows and not chat_template else None
    all_texts = _documents(source, tokenizer if chat_template else None, left_out, begin)
    first = True
    while texts := list(islice(all_texts, DOCUMENTS_AT_A_TIME)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if separator is not None and not first:
                yield separator
            yield from ids
            first = False


def _documents(source: TextSource, chat_tokenizer: Any | None, left_out: Counter[str], begin: int = 0) -> Iterator[str]:
    """The texts of a source. Empty ones are left out, and counted where they are rows."""
    if source.has_rows:
        rows = _rows(source, begin, chat=chat_tokenizer is not None)
    elif chat_tokenizer is None:
        rows = ({"text": piece} for piece in _pieces(_stream(source)))
    else:
        rows = ({"text": part} for part in _stream(source).split("\n\n") if part)  # each paragraph is a turn
    for number, row in enumerate(rows):
        where = f"row {number} of {source.name}"
        if chat_tokenizer is None:
            text = _text_of(row, where)
        else:
            messages = messages_of(row, where, left_out)
            text = rendered(chat_tokenizer, messages, where) if messages else ""
        if text:
            yield text
        elif chat_tokenizer is None:
            left_out["rows without text"] += 1


def _text_of(row: Row, where: str) -> str:
    """The text of a row of one column; empty when it has none."""
    (value,) = row.values()
    if value is not None and not isinstance(value, str):
        raise StatsError(
            f"{where} holds {type(value).__name__} where text is needed",
            hint="set `column` to a column of text, or chat_template for messages",
        )
    return value or ""


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces cut before the white space at the end of a line: tokenizers in use do not join it with what
    stands before it, so the tokens are those of the whole text."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + PIECE_CHARACTERS)
        length = len(text[start:newline].rstrip()) if newline >= 0 else 0
        stop = len(text) if newline < 0 else start + length if length else newline + 1
        yield text[start:stop]
        start = stop


def _stream(source: TextSource) -> str:
    """The whole text of a file, or of one that is always at hand."""
    assert source.path is not None, "a data set has rows, and no text of its own"
    named = source.path in TITLES
    return embedded_text(source.split or "calibration", source.path) if named else file_text(source.path)


def _rows(source: TextSource, begin: int, *, chat: bool) -> Iterator[Row]:
    """The rows of a source, each with the columns that its text is made of."""

    def columns(names: Sequence[str]) -> tuple[str, ...]:
        return _columns(source, names, chat)

    if source.path == MIX:
        texts = documents(source.split or "calibration")
        return ({"text": texts[(begin + i) % len(texts)]} for i in range(len(texts)))
    return file_rows(source.path, columns) if source.path is not None else _dataset_rows(source, columns)


def _columns(source: TextSource, names: Sequence[str], chat: bool) -> tuple[str, ...]:
    """The column that was asked for, or the usual ones; StatsError names the ones there are."""
    usual = chat_columns(names)
    if chat and source.column is None and usual:
        return usual
    column = source.column or "text"
    if column in names:
        return (column,)
    close = nearest(column, list(names))
    hint = f"did you mean {close}?" if close else "set `column`"
    if source.column is None and (chat or usual):
        hint = SHAPES if chat else f"for chats ({', '.join(usual)}) set chat_template: true; else set `column`"
    raise StatsError(f"{source.name} has no column {column!r}; it has {brief(', '.join(names)) or 'none'}", hint=hint)


def _dataset_rows(source: TextSource, columns: Columns) -> Iterator[Row]:
    """The rows of a data set of the Hub, streamed."""
    needs_extra("datasets")
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split or "train", streaming=True)
        for row in rows:
            yield {name: row[name] for name in columns(list(row))}
    except (OSError, ValueError) as error:
        raise StatsError(
            f"cannot stream the data set {source.dataset}: {error}",
            hint="without a network, give `path` to a text file, or use the mix that ships with outlierq (`text: mix`)",
        ) from error
