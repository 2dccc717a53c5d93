"""The record that a run left beside a checkpoint (`core/machine/record.py`), held against its files as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from outlierq.core.errors import OutlierqError, SourceError
from outlierq.core.machine.own_files import is_name_below
from outlierq.core.machine.record import OF_TENSORS, PIECE_BYTES, digest_of_tensors, file_entry, signature_of
from outlierq.core.machine.untrusted import json_object
from outlierq.core.report import REPORT_NAME, Report, report_of_file
from outlierq.load.decode import read_headers
from outlierq.load.source.shards import StoredTensor

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# Their content says nothing that a program reads; a card is written anew by `publish`.
PROSE = (".md", ".txt", ".html", ".png")
PAPERS = ("readme", "license", "licence", "notice", "use_policy", "copying")
VOCABULARIES = ("merges.txt", "vocab.txt")
# A file of these names changes what programs make of the folder, even one that was not there before.
READ_BY_PROGRAMS = re.compile(
    r".*\.(safetensors|gguf)|(model|pytorch_model)\b.*\.(json|bin)|chat_template\.\w+|tokenizer.*\.(json|model)|vocab\.\w+"
    r"|merges\.txt|added_tokens\.json|special_tokens_map\.json|generation_config\.json|\w*processor_config\.json"
    r"|quant\w*_config\.json|hf_quant_config\.json|adapter_config\.json|config\.json"
)


def report_beside(path: Path) -> Report | None:
    """The report of the run that wrote a folder, or a GGUF file; None where there is none. OutlierqError when it cannot
    be read.
    """
    stored = _report_file(path)
    if not stored.is_file():
        return None
    try:
        report = Report.from_dict(json_object(stored.read_bytes(), stored.name))
    except OSError as error:
        raise SourceError(f"{stored.name} cannot be read: {error}") from error
    return report if path.is_dir() or report.record is None or path.name in _files(report) else None


def result_in(place: Path) -> Path:
    """What is opened of a result: the folder, or the one GGUF file in it."""
    files = sorted(place.glob("*.gguf")) if place.is_dir() and not (place / "config.json").is_file() else []
    return files[0] if len(files) == 1 else place


def _report_file(path: Path) -> Path:
    """Where the report of a folder or file stands, if there is one: of a file beside it, or with its folder."""
    if path.is_dir():
        return path / REPORT_NAME
    own = report_of_file(path)
    return own if own.is_file() else path.with_name(REPORT_NAME)


def check_recorded(checkpoint: Checkpoint, *, read_weights: bool = True) -> None:
    """SourceError when a file beside or in the checkpoint is not the one that the run wrote which it came from.

    read_weights: compare all bytes of the weights; without it their sizes only, which takes no time.
    """
    changed = changed_since_run(checkpoint, read_weights=read_weights)
    if changed:
        name, what = changed[0]
        raise SourceError(
            f"{checkpoint.source} is not what its run wrote: {name} {what}",
            hint=f"`outlierq verify` lists what changed; where the change is meant, remove {REPORT_NAME}",
        )


def changed_since_run(checkpoint: Checkpoint, *, read_weights: bool = True) -> list[tuple[str, str]]:
    """`changed_files` of the folder that a checkpoint lies in; none where its weights lie elsewhere, at the Hub."""
    if checkpoint.digests:
        return []
    report = report_beside(checkpoint.path)
    return [] if report is None else list(changed_files(checkpoint.path, report, read_weights=read_weights))


def changed_files(path: Path, report: Report, *, read_weights: bool = True) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) for every file that is not what the report's record says; none without a record.

    path: the folder, or the GGUF file. read_weights: as of `check_recorded`. SourceError when a file cannot be read.
    """
    record = report.record
    if record is None:
        return
    stored, folder = _report_file(path), path if path.is_dir() else path.parent
    content = json_object(stored.read_bytes(), stored.name) if stored.is_file() else report.to_dict()
    if record.get("signed") != signature_of(content):
        yield stored.name, "was changed since the run: its signature is that of another content"
    files = _files(report)
    for name, entry in files.items():
        what = _difference(folder, name, entry if isinstance(entry, Mapping) else {}, read_weights)
        if what and not is_prose(name):
            yield name, what
    if stored.name != REPORT_NAME:
        return  # of one file, in a folder that others lie in, too
    for name in sorted(path.name for path in folder.iterdir() if path.is_file()):
        if name not in files and READ_BY_PROGRAMS.fullmatch(name):
            yield name, "was not written by the run, and programs that load the folder may read it"


def is_prose(name: str) -> bool:
    """Whether a file is there for people only."""
    return name.lower().startswith(PAPERS) or (name.lower().endswith(PROSE) and name not in VOCABULARIES)


def _files(report: Report) -> Mapping[str, Any]:
    """The record's entries by name of the file."""
    files = (report.record or {}).get("files")
    return files if isinstance(files, Mapping) else {}


def _difference(folder: Path, name: str, entry: Mapping[str, Any], read_weights: bool) -> str | None:
    """What is wrong with one file; None when it is the one that was written."""
    path = folder / name
    if not is_name_below(name) or not path.is_file():
        return "was written by the run, and is not there"
    try:
        size = path.stat().st_size
        is_unread = OF_TENSORS in entry and not read_weights
        if size == entry.get("bytes") and (is_unread or _entry(path, OF_TENSORS in entry) == dict(entry)):
            return None
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except OutlierqError as error:
        return f"is damaged: {error.what}"
    return f"was changed since the run ({size:,} bytes, {entry.get('bytes', 0):,} written)"


def _entry(path: Path, of_weights: bool) -> dict[str, Any]:
    """The entry that a record of the file as it is now would hold."""
    if not of_weights:
        return file_entry(path)
    return {"bytes": path.stat().st_size, OF_TENSORS: weights_digest(path)}


def weights_digest(path: Path) -> str:
    """`core.machine.record.digest_of_tensors` of a weight file. SourceError when its header cannot be read."""
    tensors = read_headers(path.suffix.removeprefix("."), path).values()
    ordered = sorted(tensors, key=lambda stored: (stored.start, stored.info.nbytes, stored.info.name))
    with path.open("rb") as file:
        header = file.read(ordered[0].start if ordered else path.stat().st_size)
        return digest_of_tensors(header, [_digest(file, stored) for stored in ordered])


def _digest(file: BinaryIO, stored: StoredTensor) -> bytes:
    """XXH3-128 of the bytes of one tensor."""
    import xxhash

    digest, left = xxhash.xxh3_128(), stored.info.nbytes
    file.seek(stored.start)
    while left and (piece := file.read(min(left, PIECE_BYTES))):
        digest.update(piece)
        left -= len(piece)
    return digest.digest()
