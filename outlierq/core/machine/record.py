"""The record of a run, kept in its report: what was written, to the byte, and a digest of all that is said about it.

    run     what the run was made of: versions, source, recipe, statistics (the identity of its journal)
    files   by name: `bytes`, and `xxh3_128` of them; of a weight file `xxh3_128_of_tensors`, see `digest_of_tensors`
    units   by name of a unit of work: the digest of its tensors' digests, as it stood in the journal
    experts by block: numbers of the experts that pruning left, where it took some
    signed  sha256 of the whole report but for `evaluation` and `cache`, which may be added later

XXH3 tells damage and mistakes, at the speed of memory; it is no proof against somebody who writes a new record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlierq.core.report import Report

PIECE_BYTES = 1 << 22
LATER = ("evaluation", "cache")  # fields of a report
OF_BYTES, OF_TENSORS = "xxh3_128", "xxh3_128_of_tensors"


def signed(report: Report, record: Mapping[str, Any] | None = None) -> Report:
    """The report with a record, or with its own signed anew."""
    content = dict((report.record or {}) if record is None else record)
    content.pop("signed", None)
    report = replace(report, record=content)
    return replace(report, record={**content, "signed": signature(report)})


def signature(report: Report) -> str:
    """Sha256 hex of what the report says, without its own signature and without what was measured later."""
    return signature_of(report.to_dict())


def signature_of(content: Mapping[str, Any]) -> str:
    """The same of a report as it stands in its file: a later version knows fields that an earlier one did not sign."""
    values = {key: value for key, value in content.items() if key not in LATER}
    values["record"] = {key: value for key, value in (content.get("record") or {}).items() if key != "signed"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of a file that holds no weights."""
    import xxhash

    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, OF_BYTES: digest.hexdigest()}


def bytes_entry(content: bytes) -> dict[str, Any]:
    """The same for a file with this content."""
    import xxhash

    return {"bytes": len(content), OF_BYTES: xxhash.xxh3_128(content).hexdigest()}


def weights_entry(size: int, header: bytes, tensors: Iterable[bytes]) -> dict[str, Any]:
    """The entry of a weight file. header: all bytes before the first tensor. tensors: their digests in file order."""
    return {"bytes": size, OF_TENSORS: digest_of_tensors(header, tensors)}


def digest_of_tensors(header: bytes, tensors: Iterable[bytes]) -> str:
    """XXH3-128 hex of the header's XXH3-128 and those of all tensors in file order.

    It is made of what is known when every tensor was read back once; the file need not be read again for it.
    """
    import xxhash

    return xxhash.xxh3_128(xxhash.xxh3_128(header).digest() + b"".join(tensors)).hexdigest()


def digest_of_unit(tensors: Iterable[bytes]) -> str:
    """XXH3-128 hex of the digests of a unit's tensors in file order."""
    import xxhash

    return xxhash.xxh3_128(b"".join(tensors)).hexdigest()
