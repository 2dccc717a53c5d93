"""Stage 1, load: a folder, a Hub id or a GGUF file becomes a `Checkpoint`, its config a skeleton and a structure.

Public names are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "attention_names": "attention",
    "stored_prefix": "attention",
    "drop_shards": "sources",
    "is_hub_id": "sources",
    "make_room": "sources",
    "open_checkpoint": "sources",
    "stream_checkpoint": "sources",
    "build_skeleton": "skeleton",
    "check_unchanged": "unchanged",
    "checkpoint_names": "names",
    "find_structure": "skeleton",
    "fused_experts": "experts",
    "load_tensors_into": "skeleton",
    "looking_up": "lookup",
    "reading_ahead": "read_ahead",
    "release": "skeleton",
    "rows_of": "sources",
    "decode_codes": "decoders",
    "decode_float_quantized": "decoders",
    "decode_int_quantized": "decoders",
    "decode_pack_quantized": "decoders",
    "decode_rows": "decoders",
    "load_model": "dense",
    "load_tokenizer": "dense",
    "unpacked": "packed",
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
