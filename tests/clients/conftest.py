"""Checkpoints are written once; the last one's dequantized model is kept, as the tests of one follow each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path

import pytest

from clients.exports import write
from clients.jobs import Agreement, Dequantized, home


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of an export by name. The others start from the dense one, which is quicker to read than GGUF."""
    from outlierq.pipeline.demo import default_model

    root = tmp_path_factory.mktemp("exports")

    @cache
    def folder(name: str) -> Path:
        source = default_model() if name == "dense" else folder("dense")
        return write(name, source, root / name)

    return folder


@pytest.fixture(scope="session")
def dequantized() -> Callable[[Path], Dequantized]:
    """The dequantized model of a checkpoint; only the last one is kept."""
    return lru_cache(maxsize=1)(Dequantized)


@pytest.fixture(scope="session")
def record() -> Callable[[str, str, Agreement], None]:
    """Adds a line of figures to `results.jsonl` in the clients' folder, for docs/clients.md."""
    results = home() / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)

    def add(client: str, name: str, found: Agreement) -> None:
        with results.open("a") as file:
            file.write(json.dumps({"client": client, "checkpoint": name, **asdict(found)}) + "\n")

    return add
