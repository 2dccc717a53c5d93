"""Stage 1, load: a folder, a Hub id or a GGUF file becomes a `Checkpoint`, its config a skeleton and a structure.

Public names are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "attention_names": "model.attention",
    "stored_prefix": "model.attention",
    "is_hub_id": "sources",
    "open_checkpoint": "sources",
    "stream_checkpoint": "sources",
    "study": "model.study",
    "build_skeleton": "model.skeleton",
    "check_unchanged": "source.unchanged",
    "differing": "source.unchanged",
    "lasting_stamps": "source.unchanged",
    "misplaced": "model.places",
    "refuse_other_model": "model.places",
    "tokenizer_digest": "source.tokenizer_files",
    "checkpoint_names": "model.names",
    "find_structure": "model.skeleton",
    "experts_apart": "model.experts_apart",
    "experts_together": "model.experts_apart",
    "fused_experts": "model.fused_experts",
    "fused_pieces": "model.experts_apart",
    "leave_empty": "model.skeleton",
    "load_tensors_into": "model.skeleton",
    "looking_up": "model.lookup",
    "reading_ahead": "source.read_ahead",
    "release": "model.skeleton",
    "skeleton_config": "model.skeleton",
    "decode_codes": "packed.bits",
    "decode_float_quantized": "packed.byte_codes",
    "decode_int_quantized": "packed.byte_codes",
    "decode_pack_quantized": "packed.bits",
    "declared_class": "model.architecture",
    "decode_rows": "decode",
    "described": "packed.described",
    "packed_fault": "model.packed_load",
    "read_headers": "decode",
    "served": "decode",
    "changed_files": "record",
    "changed_since_run": "record",
    "check_recorded": "record",
    "report_beside": "record",
    "load_model": "whole",
    "load_tokenizer": "whole",
    "stored_tokens": "gguf.tokenizer",
    "unpacked": "decode",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
