"""Stage 1, load: a folder, a Hub id or a GGUF file becomes a `Checkpoint`, its config a skeleton and a structure.

Public names are imported on first use, so that importing this package costs nothing: each stands below twice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the names are, for the type checker
    from outlierq.load.decode import decode_rows as decode_rows
    from outlierq.load.decode import presented as presented
    from outlierq.load.decode import read_headers as read_headers
    from outlierq.load.decode import served as served
    from outlierq.load.decode import unpacked as unpacked
    from outlierq.load.gguf.checkpoint import GgufCheckpoint as GgufCheckpoint
    from outlierq.load.gguf.file import read_gguf_header as read_gguf_header
    from outlierq.load.gguf.frame import FramedCheckpoint as FramedCheckpoint
    from outlierq.load.gguf.tokenizer import stored_token_types as stored_token_types
    from outlierq.load.gguf.tokenizer import stored_tokens as stored_tokens
    from outlierq.load.model.architecture import declared_class as declared_class
    from outlierq.load.model.attention import SERVED_CACHES as SERVED_CACHES
    from outlierq.load.model.attention import attend_through as attend_through
    from outlierq.load.model.attention import attention_names as attention_names
    from outlierq.load.model.attention import round_served_cache as round_served_cache
    from outlierq.load.model.attention import stored_prefix as stored_prefix
    from outlierq.load.model.conversion.packed_load import packed_fault as packed_fault
    from outlierq.load.model.decoder import block_list as block_list
    from outlierq.load.model.experts.apart import experts_apart as experts_apart
    from outlierq.load.model.experts.apart import experts_together as experts_together
    from outlierq.load.model.experts.apart import fused_pieces as fused_pieces
    from outlierq.load.model.experts.fused import replaced_experts as replaced_experts
    from outlierq.load.model.experts.fused import unmerged_experts as unmerged_experts
    from outlierq.load.model.lookup import looking_up as looking_up
    from outlierq.load.model.names import checkpoint_names as checkpoint_names
    from outlierq.load.model.places import misplaced as misplaced
    from outlierq.load.model.places import refuse_other_model as refuse_other_model
    from outlierq.load.model.rounds import refuse_rounds as refuse_rounds
    from outlierq.load.model.skeleton import build_skeleton as build_skeleton
    from outlierq.load.model.skeleton import find_structure as find_structure
    from outlierq.load.model.skeleton import leave_empty as leave_empty
    from outlierq.load.model.skeleton import load_tensors_into as load_tensors_into
    from outlierq.load.model.skeleton import release as release
    from outlierq.load.model.skeleton import skeleton_config as skeleton_config
    from outlierq.load.model.study import study as study
    from outlierq.load.packed.codes.bits import decode_codes as decode_codes
    from outlierq.load.packed.codes.bits import decode_pack_quantized as decode_pack_quantized
    from outlierq.load.packed.codes.byte_codes import decode_float_quantized as decode_float_quantized
    from outlierq.load.packed.codes.byte_codes import decode_int_quantized as decode_int_quantized
    from outlierq.load.packed.described import described as described
    from outlierq.load.record import changed_files as changed_files
    from outlierq.load.record import changed_since_run as changed_since_run
    from outlierq.load.record import check_recorded as check_recorded
    from outlierq.load.record import report_beside as report_beside
    from outlierq.load.record import result_in as result_in
    from outlierq.load.source.read_ahead import reading_ahead as reading_ahead
    from outlierq.load.source.tokenizer_files import tokenizer_digest as tokenizer_digest
    from outlierq.load.source.unchanged import check_unchanged as check_unchanged
    from outlierq.load.source.unchanged import differing as differing
    from outlierq.load.source.unchanged import lasting_stamps as lasting_stamps
    from outlierq.load.sources import is_hub_id as is_hub_id
    from outlierq.load.sources import open_checkpoint as open_checkpoint
    from outlierq.load.sources import stream_checkpoint as stream_checkpoint
    from outlierq.load.whole import load_model as load_model
    from outlierq.load.whole import load_processor as load_processor
    from outlierq.load.whole import load_tokenizer as load_tokenizer

_HOMES = {
    "attention_names": "model.attention",
    "stored_prefix": "model.attention",
    "SERVED_CACHES": "model.attention",
    "attend_through": "model.attention",
    "block_list": "model.decoder",
    "round_served_cache": "model.attention",
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
    "experts_apart": "model.experts.apart",
    "experts_together": "model.experts.apart",
    "fused_pieces": "model.experts.apart",
    "leave_empty": "model.skeleton",
    "load_tensors_into": "model.skeleton",
    "looking_up": "model.lookup",
    "reading_ahead": "source.read_ahead",
    "refuse_rounds": "model.rounds",
    "release": "model.skeleton",
    "skeleton_config": "model.skeleton",
    "decode_codes": "packed.codes.bits",
    "decode_float_quantized": "packed.codes.byte_codes",
    "decode_int_quantized": "packed.codes.byte_codes",
    "decode_pack_quantized": "packed.codes.bits",
    "declared_class": "model.architecture",
    "decode_rows": "decode",
    "described": "packed.described",
    "packed_fault": "model.conversion.packed_load",
    "presented": "decode",
    "read_headers": "decode",
    "served": "decode",
    "FramedCheckpoint": "gguf.frame",
    "GgufCheckpoint": "gguf.checkpoint",
    "read_gguf_header": "gguf.file",
    "changed_files": "record",
    "changed_since_run": "record",
    "check_recorded": "record",
    "report_beside": "record",
    "result_in": "record",
    "load_model": "whole",
    "load_processor": "whole",
    "load_tokenizer": "whole",
    "stored_tokens": "gguf.tokenizer",
    "replaced_experts": "model.experts.fused",
    "unmerged_experts": "model.experts.fused",
    "stored_token_types": "gguf.tokenizer",
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
