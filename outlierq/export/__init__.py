"""Stage 6: one file per on-disk format, the layout, the writer, and read-back verification."""

from __future__ import annotations

from types import ModuleType


def exporter(name: str) -> ModuleType:
    """The format module: `obstacle`, `clients`, `tensor_specs`, `encode`, `quantization_config`."""
    from outlierq.export import compressed_tensors, dense

    return {"compressed-tensors": compressed_tensors, "dense": dense}[name]
