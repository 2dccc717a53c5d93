"""The checkpoints that the clients get: SmolLM2 in every format and scheme that some client is said to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# 576 columns: groups of 64 divide every width of SmolLM2, groups of 128 do not.
GROUPS = ("quantize.group_size=64",)
ASYMMETRIC = (*GROUPS, "quantize.symmetric=false")
Q4_K = ("quantize.group_size=32", "quantize.symmetric=false", "quantize.scales=two-level")
# What is tested is the file, not its quality.
SHORT = ("calibration.samples=16", "calibration.sequence_length=256")


@dataclass(frozen=True)
class Export:
    """A checkpoint as a recipe and its settings."""

    recipe: str
    settings: tuple[str, ...] = ()


EXPORTS = {
    "dense": Export("dense"),
    "ct-w4": Export("rtn-w4", GROUPS),
    "ct-w4-two-groups": Export("rtn-w4"),  # 64 and 128: two config groups
    "ct-w4-asym": Export("rtn-w4", ASYMMETRIC),
    "ct-w8": Export("rtn-w8"),
    "ct-w8a8": Export("w8a8-dynamic"),
    "ct-w8a8-static": Export("w8a8-static", SHORT),
    "ct-w8a8-rotated": Export("w8a8-dynamic", ("transform=[{method: rotate}]",)),  # its head is no longer tied
    "ct-w4a8": Export("w8a8-dynamic", ("quantize.bits=4", *GROUPS)),
    "ct-fp8": Export("fp8-dynamic"),
    "ct-kv-fp8": Export("kv-fp8", SHORT),
    "ct-nvfp4": Export("nvfp4"),
    "ct-mxfp4": Export("mxfp4"),
    "awq": Export("rtn-w4", (*ASYMMETRIC, "export.format=awq")),
    "awq-sym": Export("rtn-w4", (*GROUPS, "export.format=awq")),
    "gptq": Export("rtn-w4", (*GROUPS, "export.format=gptq")),
    "gptq-asym": Export("rtn-w4", (*ASYMMETRIC, "export.format=gptq")),
    "gptq-v2": Export("rtn-w4", (*GROUPS, "export.format=gptq-v2")),
    "gptq-v2-asym": Export("rtn-w4", (*ASYMMETRIC, "export.format=gptq-v2")),
    "bitsandbytes": Export("llm-int8"),
    "gguf-q4_0": Export("rtn-w4", ("quantize.group_size=32", "export.format=gguf")),
    "gguf-q4_1": Export("rtn-w4", ("quantize.group_size=32", "quantize.symmetric=false", "export.format=gguf")),
    "gguf-q4_k": Export("rtn-w4", (*Q4_K, "export.format=gguf")),  # widths of 576 as Q4_1
    "gguf-mxfp4": Export("mxfp4", ("export.format=gguf",)),
    "gguf-q8_0": Export("rtn-w8", ("quantize.group_size=32", "export.format=gguf")),
}


def write(name: str, source: str | Path, folder: Path) -> Path:
    """Write the export to `folder`, which must not exist."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    export = EXPORTS[name]
    quantize(make_plan(open_checkpoint(str(source)), load(export.recipe, list(export.settings))), folder)
    return folder
