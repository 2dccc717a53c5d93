"""The tokenizer of a GGUF file with SentencePiece pieces, preparing text as llama.cpp does.

transformers builds Llama's own class for such files: it puts no space before text that begins with one or stands behind
a special token, and puts one before all other text even where the file says that there is none (Gemma's).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.load.gguf.file import read_gguf_header
from outlierq.load.model.foreign import tokenizer_faults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"


def gguf_tokenizer(path: Path, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the metadata of a GGUF file. source: what the user wrote. SourceError when it cannot be used."""
    from transformers import AutoTokenizer

    path = path.resolve()
    with tokenizer_faults(source):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return with_spaces_of(tokenizer, read_gguf_header(path).fields)


def with_spaces_of(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers made of a file with these metadata; it is changed in place."""
    from tokenizers import decoders, normalizers

    if fields.get("tokenizer.ggml.model") != "llama":
        return tokenizer
    backend, prefix = tokenizer.backend_tokenizer, fields.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    backend.pre_tokenizer = None
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if prefix else plain)
    return tokenizer
