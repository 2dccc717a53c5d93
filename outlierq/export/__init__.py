"""Stage 6: one file per on-disk format, the layout, the writer, and read-back verification."""

from __future__ import annotations

from types import ModuleType


def exporter(name: str) -> ModuleType:
    """The format module: `obstacle`, `clients`, `tensor_specs`, `encode`, `quantization_config`.

    Where it has them: `SCALE_DTYPE`, and `conflict`, why schemes that it can hold cannot stand in one checkpoint.
    """
    from outlierq.export import awq, bitsandbytes, compressed_tensors, dense, gptq, gptq_v2, outlier_split

    return {
        "compressed-tensors": compressed_tensors,
        "dense": dense,
        "bitsandbytes": bitsandbytes,
        "outlierq-split": outlier_split,
        "awq": awq,
        "gptq": gptq,
        "gptq-v2": gptq_v2,
    }[name]
