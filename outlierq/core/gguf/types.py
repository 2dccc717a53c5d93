"""The types of blocks that a GGUF file may hold, as llama.cpp's `ggml-common.h` and `ggml-quants.c` define them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

# Fields of a `QuantScheme` that a type decides.
SETTINGS = ("kind", "bits", "symmetric", "group_size", "scales")


@dataclass(frozen=True)
class BlockType:
    """How `columns` neighbouring weights of a row are stored in `nbytes` bytes. Everything else follows from its name.

    kind, bits, symmetric, group_size, scales: the fields of its scheme. codes: least and largest. small: of two-level
    scales, least and largest of those that are stored; `step` 2 says that only odd ones are. factor: by which the
    stored float16 unit is multiplied (a power of two). vector: weights that one code of the codebook stands for, 1 for
    a table of single values. even_signs: of every 8 weights an even number is negative. instead: the type that
    llama-quantize takes where `columns` does not divide a width, None where there is none.
    """

    name: str
    columns: int
    nbytes: int
    kind: str
    bits: int
    symmetric: bool
    group_size: int
    scales: str
    codes: tuple[int, int]
    small: tuple[int, int] = (1, 1)
    step: int = 1
    factor: float = 1.0
    vector: int = 1
    even_signs: bool = False
    instead: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of its scheme, by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def groups(self) -> int:
        """Groups of a block, which share its units."""
        return self.columns // self.group_size

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and all."""
        return 8 * self.nbytes / self.columns


@cache
def block_types() -> dict[str, BlockType]:
    """Every type by its name in llama.cpp ("Q4_K"), which is that of the `gguf` package, too."""
    text = (resources.files("outlierq") / "data" / "gguf_types.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    return {name: BlockType(name, **_frozen(row)) for name, row in rows.items()}


def _frozen(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table with tuples for lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
