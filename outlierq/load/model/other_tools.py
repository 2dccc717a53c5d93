"""What other programs leave in a folder, named in words: who compressed it, and why its names do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

# Put before every name by what wraps a model while it is trained: DataParallel, torch.compile, PEFT.
WRAPPERS = {
    "module.": "torch's DataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "torch's FSDP",
}
# Where programs that compress keep what they did, when it is not in config.json.
ASIDE = {"quantize_config.json": "AutoGPTQ", "quant_config.json": "AutoAWQ", "hf_quant_config.json": "ModelOpt"}


def compressor(said: Any) -> str | None:
    """What the checkpoint was compressed with; None for a plain one. said: of `packed.described.described`."""
    if not said:
        return None
    if not isinstance(said, Mapping):
        return "something that config.json does not describe"
    method = said.get("quant_method")
    return str(method) if method else "a method that config.json does not name"


def lack_hint(checkpoint: Checkpoint, lost: Sequence[str]) -> str:
    """What to try when parameters are missing."""
    method = compressor(checkpoint.config.get("quantization_config"))
    if method:
        return f"this checkpoint is already compressed ({method}); start from the original model"
    beside = next((name for name in ASIDE if any(file.name == name for file in checkpoint.files)), None)
    if beside:
        return f"this checkpoint is already compressed ({ASIDE[beside]}, see {beside}); start from the original model"
    for prefix, wrapper in WRAPPERS.items():
        if any(f"{prefix}{name}" in checkpoint.tensors for name in lost):
            return f"its names begin with {prefix}, which {wrapper} puts there; save the model without that wrapper"
    if any(".experts." in name for name in lost):
        return "the model class merges its experts in a way that is not known here; such mixtures are not supported"
    return "the weights do not belong to this config.json, or a part of them was not downloaded"
