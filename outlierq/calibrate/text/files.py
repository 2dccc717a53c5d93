"""Files of text and of rows: the ending says what a file is, and only as much of it is read as is asked for.

An ending that is not known means plain text. What then turns out to be binary, or JSON, is refused: keys and braces are
no text that a model will read.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from outlierq.core.errors import OutlierqError, StatsError
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.untrusted import LARGEST_JSON, json_object, json_value
from outlierq.core.notes import note

MOST_BYTES = 1 << 28  # of plain text: some 60 million tokens, ten times what the largest calibration looks at
LONGEST_CELL = 1 << 24  # characters of one cell of a table
READ = (
    "it must be plain text, or rows as .jsonl, .ndjson, .json, .csv, .tsv or .parquet; all but the last may be packed "
    "as .gz, .bz2, .xz or .zst"
)
NO_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
ROWS_OF_JSON = re.compile(r'\s*(\[\s*)?\{\s*"')

Row = dict[str, Any]
Columns = Callable[[Sequence[str]], Sequence[str]]


def file_text(path: str) -> str:
    """The text of a file in UTF-8, up to `MOST_BYTES` of it (a note says so); StatsError when it is none."""
    name = Path(path).name
    with _opened(path) as file:
        raw = file.read(MOST_BYTES + 1)
        cut = len(raw) > MOST_BYTES
        text = getincrementaldecoder("utf-8-sig")().decode(raw[:MOST_BYTES], final=not cut)
    if cut:
        note(f"{name}: only the first {MOST_BYTES:,} bytes were looked at")
    if "\0" in text:
        raise StatsError(f"{name} is not text: it holds NUL characters", hint=READ)
    if ROWS_OF_JSON.match(text):
        raise StatsError(f"{name} looks like rows of JSON, and its ending says text", hint="call it .json or .jsonl")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def has_rows(path: str) -> bool:
    """Whether a file is made of rows, not of one stream of text."""
    return _endings(path)[0] in ROW_READERS


def file_rows(path: str, columns: Columns) -> Iterator[Row]:
    """The rows of a file in order, each with those of its columns that `columns` takes; StatsError when it is none."""
    ending, _ = _endings(path)
    with _opened(path) as file:
        yield from ROW_READERS[ending](file, Path(path).name, columns)


def _endings(path: str) -> tuple[str, str]:
    """What a file is, and how it is packed: ".jsonl" and ".gz"; empty where the name does not say."""
    name = Path(path).name.lower()
    packed = next((ending for ending in UNPACKERS if name.endswith(ending)), "")
    return Path(name.removesuffix(packed)).suffix, packed


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked; all that may be wrong with it becomes a StatsError."""
    name = Path(path).name
    try:
        _refuse_endless(path)
        ending, packed = _endings(path)
        if packed and ending == ".parquet":
            raise StatsError(f"{name} is packed twice", hint="unpack it: Parquet compresses its columns itself")
        with UNPACKERS.get(packed, _plain)(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise StatsError(f"{name} is not UTF-8 text: byte {error.start} does not fit", hint=READ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise StatsError(f"{name} cannot be unpacked: {error}", hint="is it whole, and does its ending fit?") from error
    except OSError as error:
        raise StatsError(
            f"cannot read {path}: {error.strerror or error}", hint="check the path of the text, and the file"
        ) from error


def _refuse_endless(path: str) -> None:
    """Only a regular file ends, and can be read twice."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise StatsError(
            f"cannot read {path}: it is {NO_FILE.get(kind, 'no regular file')}, not a file",
            hint="write the text to a file first",
        )


def _plain(path: str) -> BinaryIO:
    return open(path, "rb")


def _zstandard(path: str) -> BinaryIO:
    """Through pyarrow: Python reads zstd from 3.14 on."""
    needs_extra("pyarrow")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


UNPACKERS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}


def _picked(row: Row, columns: Columns) -> Row:
    """The columns of one row that are asked for."""
    return {name: row[name] for name in columns(list(row))}


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; a longer one than any reader takes comes in two."""
    return iter(lambda: file.readline(LARGEST_JSON + 1), b"")


def _json_lines(file: BinaryIO, name: str, columns: Columns, done: int = 0) -> Iterator[Row]:
    """One JSON object a line. done: lines that were read before."""
    for number, line in enumerate(_lines(file), start=done + 1):
        text = line.decode("utf-8-sig")
        if text.strip():
            yield _picked(json_object(text, f"line {number} of {name}", StatsError), columns)


def _json(file: BinaryIO, name: str, columns: Columns) -> Iterator[Row]:
    """An array of rows, an object of columns, or one object a line, which many tools call .json, too."""
    first = file.readline(LARGEST_JSON + 1)
    try:
        value = json_object(first, name, StatsError)
    except OutlierqError:  # not a line of rows: the whole file is one value
        hint = "write it as .jsonl, one row a line: that is read no further than needed"
        whole = first + file.read(LARGEST_JSON + 1 - len(first))
        for row in _rows_of(json_value(whole, name, StatsError, hint=hint), name):
            yield _picked(row, columns)
        return
    rest = _json_lines(file, name, columns, done=1)
    second = next(rest, None)
    if second is None:
        yield from (_picked(row, columns) for row in _rows_of(value, name))
    else:
        yield from chain([_picked(value, columns), second], rest)


def _rows_of(value: Any, name: str) -> list[Row]:
    """The rows in one JSON value: an array of objects or of texts, an object of lists, its columns, or one row."""
    if isinstance(value, list) and all(isinstance(row, dict | str) for row in value):
        return [{"text": row} if isinstance(row, str) else row for row in value]
    if isinstance(value, dict):
        return _from_columns(value) or [value]
    raise StatsError(
        f"{name} holds a {type(value).__name__} where rows are needed",
        hint="write an array of objects, or one object a line (.jsonl)",
    )


def _from_columns(value: Row) -> list[Row]:
    """The rows of an object of lists of one length; none where it is something else, a single chat for example."""
    lists = [column for column in value.values() if isinstance(column, list)]
    equal = len(lists) == len(value) and len(set(map(len, lists))) == 1
    if not equal or (len(value) == 1 and any(isinstance(entry, dict) for entry in lists[0])):
        return []
    return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]


def _table(delimiter: str) -> Callable[[BinaryIO, str, Columns], Iterator[Row]]:
    """A reader of text tables, the names of whose columns are in their first line."""

    def rows(file: BinaryIO, name: str, columns: Columns) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(iter(lambda: text.readline(LONGEST_CELL + 1), ""), delimiter=delimiter)
        try:
            for row in reader:
                if None in row:
                    said = f"line {reader.line_num} of {name} has more cells than the first line names"
                    raise StatsError(said, hint="put cells that hold the separator into quotes")
                yield _picked(row, columns)
        except csv.Error as error:
            raise StatsError(f"{name} is no table: {error} in line {reader.line_num}") from error

    return rows


def _parquet(file: BinaryIO, name: str, columns: Columns) -> Iterator[Row]:
    """A Parquet file, read batch by batch, and only the columns that are asked for."""
    needs_extra("pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        for batch in table.iter_batches(columns=list(columns(table.schema_arrow.names))):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, ArithmeticError) as error:
        raise StatsError(f"{name} is not a Parquet file: {error}") from error


ROW_READERS: dict[str, Callable[[BinaryIO, str, Columns], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}
