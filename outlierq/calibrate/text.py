"""Calibration text: sources of documents become token windows of one length, the same ones for the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from outlierq.core.block_stats import MASS_COLUMNS
from outlierq.core.errors import StatsError, during, nearest
from outlierq.core.machine.untrusted import json_object

if TYPE_CHECKING:
    import torch

EMBEDDED = "embedded"
DELIMITERS = frozenset(".,;:!?\n")  # tokens made of these are where attention sinks are found (arXiv:2402.17762)
HELD_OUT = 4  # every 4th topic of the embedded text is kept for evaluation
ROW_FILES = (".jsonl", ".ndjson", ".parquet")
# Among documents, a seeded choice looks at this many times the windows wanted: large sources are not read to the end.
POOL_FACTOR = 8
# Tokenizing one long string takes some 150 bytes of memory a character, so long texts go in pieces, a few at a time.
PIECE_CHARACTERS = 1 << 15
DOCUMENTS_AT_A_TIME = 16
SECONDS_PER_CHAT = 3.0
TEMPLATE_FAULTS = (TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RuntimeError, OSError)


@dataclass(frozen=True)
class TokenSet:
    """Token windows. ids: LongTensor [samples, sequence_length]. fingerprint: sha256 hex of ids and settings."""

    ids: torch.Tensor
    fingerprint: str
    description: str


@dataclass(frozen=True)
class TextSource:
    """Where text comes from: a file, a data set of the Hub, or the text that every Python carries.

    path: a text file (one stream of text) or .jsonl / .parquet (one document a row), or the word "embedded".
    dataset: a Hub id, with its `config`. column: what holds the text of a row, default "text" ("messages" for chats, if
    there is one). split: of the data set (default "train"), or "calibration" / "evaluation" of the embedded text.
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
        if self.path == EMBEDDED:
            return f"Python language reference ({self.split or 'calibration'} part)"
        if self.path is not None:
            return Path(self.path).name
        return " ".join(part for part in (self.dataset, self.config, self.split) if part)

    @property
    def has_rows(self) -> bool:
        """Whether it is made of documents, not of one stream of text."""
        return self.path is None or Path(self.path).suffix.lower() in ROW_FILES


def embedded_text(part: str) -> str:
    """The Python language reference that ships with Python; `part` is "calibration" or "evaluation".

    Every 4th topic, in alphabetical order, belongs to "evaluation"; the parts share no topic.
    """
    from pydoc_data.topics import topics

    if part not in ("calibration", "evaluation"):
        raise StatsError(f"the embedded text has the parts calibration and evaluation, not {part!r}")
    held_out = part == "evaluation"
    texts = [topics[name] for i, name in enumerate(sorted(topics)) if (i % HELD_OUT == HELD_OUT - 1) == held_out]
    return "\n".join(texts)


def token_windows(
    tokenizer: Any,
    sources: str | Sequence[str | Mapping[str, Any] | TextSource],
    *,
    samples: int,
    sequence_length: int,
    seed: int | None,
    chat_template: bool = False,
) -> TokenSet:
    """`samples` windows of `sequence_length` tokens, which do not overlap, shared out to the sources by weight.

    Documents are joined to one stream and cut. seed: chooses among the windows; None takes the first ones in
    order. chat_template: documents are rendered as chats ("messages", or their text as one user turn). Each window
    starts with the bos token where the tokenizer adds one by itself. StatsError when the text cannot be read or is
    too short.
    """
    import torch

    listed = [_as_source(entry) for entry in ([sources] if isinstance(sources, str) else sources)]
    if not listed or samples < 1 or sequence_length < 2:
        raise StatsError(
            f"calibration needs sources, samples and tokens, got {len(listed)}, {samples} and {sequence_length}"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    bos = _added_bos(tokenizer)
    parts = []
    for source, count in zip(listed, shares(samples, [source.weight for source in listed]), strict=True):
        with during("calibrate", source.name):
            parts.append(_windows(tokenizer, source, count, sequence_length, generator, bos, chat_template))
    ids = torch.cat(parts)
    settings = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "chat_template": chat_template}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + ids.numpy().tobytes()).hexdigest()
    names = " + ".join(source.name for source in listed)
    form = "chats" if chat_template else "text"
    return TokenSet(ids, digest, f"{samples} x {sequence_length} tokens of {form}: {names}")


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
    """A source as the recipe has it: the word "embedded", or its keys."""
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


def _added_bos(tokenizer: Any) -> int | None:
    """The bos token if the tokenizer puts it before every text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else None


def _windows(
    tokenizer: Any,
    source: TextSource,
    count: int,
    sequence_length: int,
    generator: torch.Generator | None,
    bos: int | None,
    chat_template: bool,
) -> torch.Tensor:
    """[count, sequence_length] windows of one source."""
    import torch

    if count == 0:
        return torch.empty(0, sequence_length, dtype=torch.long)
    body = sequence_length - (bos is not None)
    pool = count if generator is None else POOL_FACTOR * count
    limit = pool * body if source.has_rows or generator is None else None
    tokens = torch.tensor(list(islice(_token_stream(tokenizer, source, chat_template), limit)), dtype=torch.long)
    available = len(tokens) // body
    if available < count:
        raise StatsError(
            f"the text has {len(tokens)} tokens; {count} samples of {sequence_length} tokens need {count * body}",
            hint=f"use samples: {available}, a smaller sequence_length, or more text" if available else "use more text",
        )
    windows = tokens[: available * body].view(available, body)
    order = torch.arange(count) if generator is None else torch.randperm(available, generator=generator)[:count]
    windows = windows[order]
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], dim=1)


def _token_stream(tokenizer: Any, source: TextSource, chat_template: bool) -> Iterator[int]:
    """The tokens of all documents. Rows are separated by the eos token, chats by what their template writes."""
    eos = getattr(tokenizer, "eos_token_id", None)
    separated = source.has_rows and not chat_template and eos is not None
    documents = _documents(source, tokenizer if chat_template else None)
    first = True
    while texts := list(islice(documents, DOCUMENTS_AT_A_TIME)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if separated and not first:
                yield eos
            yield from ids
            first = False


def _documents(source: TextSource, chat_tokenizer: Any | None) -> Iterator[str]:
    """The texts of a source, without empty ones."""
    if source.has_rows:
        values = _column(source, chat=chat_tokenizer is not None)
    elif chat_tokenizer is None:
        values = _pieces(_file_text(source))
    else:
        values = iter(_file_text(source).split("\n\n"))  # each paragraph is a turn
    for number, value in enumerate(values):
        if chat_tokenizer is not None and value:
            value = _rendered(chat_tokenizer, value, number)
        if value is not None and not isinstance(value, str):
            raise StatsError(
                f"row {number} of {source.name} holds {type(value).__name__} where text is needed",
                hint="set `column` to a column of text, or chat_template for messages",
            )
        if value:
            yield value


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


def _file_text(source: TextSource) -> str:
    """The whole text of a file, or the embedded one."""
    if source.path == EMBEDDED:
        return embedded_text(source.split or "calibration")
    try:
        return Path(source.path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StatsError(f"{source.name} is not UTF-8 text: byte {error.start} does not fit") from error
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: TextSource, error: OSError) -> StatsError:
    """A file that cannot be opened."""
    return StatsError(f"cannot read {source.path}: {error.strerror or error}", hint="check the path of the text")


def within(seconds: float, call: Callable[[], str]) -> str:
    """What `call` returns; TimeoutError when it takes longer. It then goes on in a thread that ends with the process:
    a template is a program, and its sandbox knows no time.
    """
    results: list[str] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # raised again below, in the thread that asked
            faults.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"it takes more than {seconds:g} seconds")
    if faults:
        raise faults[0]
    return results[0]


def _rendered(tokenizer: Any, value: Any, number: int) -> str:
    """One chat in the tokenizer's own template; plain text is one turn of the user."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise StatsError("the tokenizer has no chat template", hint="leave chat_template out")
    if not isinstance(value, str | list):
        raise StatsError(f"row {number} holds {type(value).__name__} where text or messages are needed")
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    try:
        return within(SECONDS_PER_CHAT, lambda: tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, *TEMPLATE_FAULTS) as error:
        raise StatsError(f"the chat template does not accept the messages of row {number}: {error}") from error


def _column(source: TextSource, *, chat: bool) -> Iterator[Any]:
    """The values of the text column, row by row."""
    if source.dataset is not None:
        return _dataset_column(source, chat)
    if Path(source.path).suffix.lower() == ".parquet":
        return _parquet_column(source, chat)
    return _jsonl_column(source, chat)


def _choose_column(source: TextSource, columns: Sequence[str], chat: bool) -> str:
    """The column that was asked for, or the usual one; StatsError names the ones there are."""
    column = source.column or ("messages" if chat and "messages" in columns else "text")
    if column not in columns:
        close = nearest(column, list(columns))
        raise StatsError(
            f"{source.name} has no column {column!r}; it has {', '.join(columns) or 'none'}",
            hint=f"did you mean {close}?" if close else "set `column`",
        )
    return column


def _jsonl_column(source: TextSource, chat: bool) -> Iterator[Any]:
    """One JSON object a line."""
    try:
        with open(source.path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = _json_row(source, number, line)
                    yield row[_choose_column(source, list(row), chat)]
    except UnicodeDecodeError as error:
        raise StatsError(f"{source.name} is not UTF-8 text: byte {error.start} does not fit") from error
    except OSError as error:
        raise _unreadable(source, error) from error


def _json_row(source: TextSource, number: int, line: str) -> dict[str, Any]:
    """One line of a JSONL file."""
    return json_object(line, f"line {number} of {source.name}", StatsError)


def _parquet_column(source: TextSource, chat: bool) -> Iterator[Any]:
    """One column of a Parquet file, read batch by batch."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open(source.path, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            column = _choose_column(source, table.schema_arrow.names, chat)
            for batch in table.iter_batches(columns=[column]):
                yield from batch.column(0).to_pylist()
    except OSError as error:  # Parquet's own faults are OSErrors, too
        raise _unreadable(source, error) from error
    except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
        raise StatsError(f"{source.name} is not a Parquet file: {error}") from error


def _dataset_column(source: TextSource, chat: bool) -> Iterator[Any]:
    """One column of a data set of the Hub, streamed."""
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.config, split=source.split or "train", streaming=True)
        for row in rows:
            yield row[_choose_column(source, list(row), chat)]
    except (OSError, ValueError) as error:
        raise StatsError(
            f"cannot stream the data set {source.dataset}: {error}",
            hint="without a network, give `path` to a text file, or use the embedded text",
        ) from error
