"""Measurements are kept by the content of what was measured, so that the same question is answered once.

The key is a digest of the model's and the data's bytes and of every setting; a changed byte, setting or version is
another key. Nothing that failed is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.cache_folder import cache_folder
from outlierq.core.model import Checkpoint
from outlierq.core.report import REPORT_NAME
from outlierq.load.source.carried import carried_names

# What decides how a checkpoint answers: weights, config, tokenizer, templates, code. Cards and licences do not.
DECIDING = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py", ".gguf")
WEIGHTS = (".safetensors", ".gguf")
# Reports beside the weights, which may be added later.
REPORTS = (REPORT_NAME, "outliers.json")
DATA = (".jsonl", ".json", ".parquet", ".csv")
PIECE_BYTES = 1 << 24


def content_hash(checkpoint: Checkpoint) -> str:
    """XXH3-128 hex of all bytes that decide how the checkpoint answers (the fingerprint reads a sample of them)."""
    path = checkpoint.path
    if path.is_file():
        return _digest([(path.name, path)])
    weights = [f.name for f in path.iterdir() if f.suffix in WEIGHTS or f.name.endswith(".index.json")]
    names = sorted({*carried_names(path), *weights, "config.json"} - {*REPORTS})
    here = _digest((name, path / name) for name in names if name.endswith(DECIDING) and (path / name).is_file())
    # Weights that come from the Hub when they are read are known by the Hub's digests.
    return key_of({"here": here, "remote": checkpoint.digests}) if checkpoint.digests else here


def data_hash(folder: Path) -> str:
    """The same for a folder of task data."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in DATA and path.is_file())
    if not files:
        raise SourceError(f"{folder} holds no data files ({', '.join(DATA)})", hint="see --data-dir in docs/ci.md")
    return _digest((str(path.relative_to(folder)), path) for path in files)


def key_of(settings: Mapping[str, Any]) -> str:
    """The name under which a measurement with these settings is kept."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def recall(key: str) -> dict[str, Any] | None:
    """What was kept under `key`; None when there is nothing, or not what was written: then it is measured again."""
    try:
        entry = json.loads(_place(key).read_bytes())
        measured = entry["measured"]
        return measured if entry["digest"] == _entry_digest(key, measured) else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def keep(key: str, measured: Mapping[str, Any]) -> str | None:
    """Keep a measurement: whole or not at all. Why it could not be kept, as a sentence; None when it was."""
    place = _place(key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"digest": _entry_digest(key, measured), "measured": measured}), encoding="utf-8")
        part.replace(place)
    except OSError as error:
        return f"the result was not kept for the next time: {place.parent}: {error.strerror or error}"
    return None


def _entry_digest(key: str, measured: Any) -> str:
    """Sha256 hex of a key and what was kept under it."""
    return hashlib.sha256(f"{key} {json.dumps(measured, sort_keys=True)}".encode()).hexdigest()


def _place(key: str) -> Path:
    return cache_folder() / "results" / f"{key}.json"


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    """One digest of names, sizes and bytes."""
    import xxhash

    digest = xxhash.xxh3_128()
    for name, path in files:
        digest.update(f"\n{name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()
