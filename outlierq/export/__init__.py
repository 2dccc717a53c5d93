"""Stage 6: one file per on-disk format, the layout, the writer, and read-back verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exporter(name: str, config: Mapping[str, Any] | None = None) -> Any:
    """The format module: `obstacle`, `clients`, `tensor_specs`, `encode`, `quantization_config`.

    Where it has them: `SCALE_DTYPE`; `by_rows`, whether some rows of a linear can be encoded alone; `conflict`, why
    schemes that it can hold cannot stand in one checkpoint; `approximation`, what of a scheme it rounds;
    `NO_NEW_BIASES`, why it holds no biases but the source's; `instead`, the scheme that it can hold in place of one
    that it cannot. A format that is not a folder of safetensors (`gguf`) is an object made of the model's config, and
    brings `plain_spec`, `plain`, `row_order`, `make_layout` and `keeps_file`.
    """
    if name == "gguf":
        from outlierq.export.gguf.format import GgufFormat

        return GgufFormat(config or {})
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
