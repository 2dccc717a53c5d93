"""Files of text and rows: every kind gives the same rows, and what is no text is refused before it is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
from pathlib import Path

import pytest

from outlierq.calibrate.text import files
from outlierq.calibrate.text.files import file_rows, file_text, has_rows
from outlierq.calibrate.text.windows import whole_text
from outlierq.core.errors import StatsError
from outlierq.core.notes import collecting

ROWS = [{"id": str(i), "text": f'the "{i}", a word'} for i in range(3)]


def columns_of(rows) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def table(separator: str) -> bytes:
    quoted = [(row["id"], '"{}"'.format(row["text"].replace('"', '""'))) for row in ROWS]
    return "\r\n".join(separator.join(cells) for cells in [("id", "text"), *quoted]).encode()


LINES = b"\n".join(json.dumps(row).encode() for row in ROWS)
WRITTEN = {
    "rows.jsonl": LINES,
    "rows.NDJSON": LINES + b"\n\n",
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "columns.json": json.dumps(columns_of(ROWS)).encode(),
    "rows.csv": b"\xef\xbb\xbf" + table(","),
    "rows.tsv": table("\t"),
    "rows.jsonl.gz": gzip.compress(LINES, mtime=0),
    "rows.json.bz2": bz2.compress(LINES),
    "rows.csv.xz": lzma.compress(table(",")),
}


def everything(names):
    return names


@pytest.mark.parametrize("name", WRITTEN)
def test_every_kind_of_rows_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(WRITTEN[name])
    assert has_rows(str(path))
    assert list(file_rows(str(path), everything)) == ROWS
    assert whole_text(str(path)) == "\n\n".join(row["text"] for row in ROWS)


def test_zstandard_is_unpacked(tmp_path):
    import pyarrow

    for name, content in (("rows.jsonl.zst", LINES), ("text.txt.zst", b"plain\r\ntext")):
        with pyarrow.output_stream(str(tmp_path / name), compression="zstd") as file:
            file.write(content)
    assert list(file_rows(str(tmp_path / "rows.jsonl.zst"), everything)) == ROWS
    assert file_text(str(tmp_path / "text.txt.zst")) == "plain\ntext"


def test_an_array_of_texts_and_a_single_row_are_rows(tmp_path):
    for name, value in (("texts.json", ["a", "b"]), ("single.json", {"messages": [{"role": "user"}]})):
        (tmp_path / name).write_text(json.dumps(value))
    assert list(file_rows(str(tmp_path / "texts.json"), everything)) == [{"text": "a"}, {"text": "b"}]
    assert list(file_rows(str(tmp_path / "single.json"), everything)) == [{"messages": [{"role": "user"}]}]


@pytest.mark.parametrize("name", ["text.txt", "text.md", "text", "text.txt.gz"])
def test_other_endings_are_plain_text_with_the_line_ends_of_python(tmp_path, name):
    raw = "\ufeffé one\r\ntwo\rthree\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert not has_rows(str(tmp_path / name))
    assert file_text(str(tmp_path / name)) == "é one\ntwo\nthree\n"


def refused(message: str, path: Path, content: bytes | None = None) -> StatsError:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StatsError, match=message) as caught:
        whole_text(str(path))
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("text", ['{"id": 1, "text": "a"}\n', '[\n  {"text": "a"}\n]', ' [{"a": 1}]'])
def test_json_under_another_ending_is_refused(tmp_path, text):
    assert ".jsonl" in refused("text.txt looks like rows of JSON", tmp_path / "text.txt", text.encode()).hint


def test_text_in_braces_is_still_text(tmp_path):
    (tmp_path / "text.tex").write_text("{\\bf bold} [1] {see below}")
    assert whole_text(str(tmp_path / "text.tex")) == "{\\bf bold} [1] {see below}"


def test_what_is_binary_is_refused_with_the_kinds_that_are_read(tmp_path):
    assert ".parquet" in refused("not UTF-8 text: byte 1", tmp_path / "a.zip", b"P\xff").hint
    assert ".csv" in refused("holds NUL characters", tmp_path / "a.tar", b"name\0\0\0text").hint


def test_what_never_ends_or_is_no_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.csv").mkdir()
    refused("it is a pipe, not a file", tmp_path / "pipe.jsonl")
    refused("it is a folder, not a file", tmp_path / "folder.csv")
    refused("it is a device, not a file", Path("/dev/urandom"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        refused("it is a socket, not a file", tmp_path / "s")


def test_a_large_text_is_read_to_a_bound_and_the_rest_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 6)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress("aéaéé".encode(), mtime=0))
    with collecting() as notes:
        assert file_text(str(tmp_path / "large.txt.gz")) == "aéaé"
    (tmp_path / "cut.txt").write_bytes("aéaaaéé".encode())
    with collecting():
        assert file_text(str(tmp_path / "cut.txt")) == "aéaaa"  # not half of a letter
    assert notes == ["large.txt.gz: only the first 6 bytes were looked at"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", b"no", "a.txt.gz cannot be unpacked: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"hello", mtime=0)[:-9], "cannot be unpacked: Compressed file ended"),
        ("a.csv.xz", b"no", "a.csv.xz cannot be unpacked"),
        ("a.txt.bz2", b"nothing", "cannot read .*a.txt.bz2: Invalid data stream"),
        ("a.txt.zst", b"nothing", "cannot read .*a.txt.zst"),
        ("a.parquet.gz", b"", "a.parquet.gz is packed twice"),
        ("a.json", b"5", "a.json holds a int where rows are needed"),
        ("a.json", b"[5]", "a.json holds a list where rows are needed"),
        ("a.json", b'[{"text": ', "a.json is not JSON"),
        ("a.json", b'{"text": "a"}\n{"text"', "line 2 of a.json is not JSON"),
        ("a.csv", b"id,text\n1,a,b\n", "line 2 of a.csv has more cells than the first line names"),
        ("a.csv", b"id,txt\n1,a\n", "a.csv has no column 'text'; it has id, txt"),
    ],
)
def test_damaged_rows_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StatsError, match=message):
        whole_text(str(tmp_path / name))


def test_a_cell_may_be_longer_than_pythons_own_bound(tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{'word ' * 40_000}\n")
    assert len(whole_text(str(tmp_path / "a.csv"))) == 200_000
