"""The tokenizer of a GGUF file with SentencePiece pieces, preparing text as llama.cpp does.

transformers builds Llama's own class for such files: it puts no space before text that begins with one or stands behind
a special token, and puts one before all other text even where the file says that there is none (Gemma's).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.machine.installed import needs_version
from outlierq.core.machine.utf8_path import utf8_path
from outlierq.load.gguf.file import read_gguf_header
from outlierq.load.model.foreign import tokenizer_faults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"


def gguf_tokenizer(path: Path, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the metadata of a GGUF file. source: what the user wrote. SourceError when it cannot be used."""
    from transformers import AutoTokenizer

    path = path.resolve()
    fields = read_gguf_header(path).fields
    if fields.get("tokenizer.ggml.model") == "llama":
        needs_version("transformers", ">=5.18", "a tokenizer of SentencePiece pieces in a GGUF file")
    with tokenizer_faults(source), utf8_path(path) as file:
        tokenizer = with_ends_of(AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), fields)
    return with_spaces_of(tokenizer, fields)


def with_ends_of(tokenizer: PreTrainedTokenizerBase, fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with the first and last token that the file names; it is changed in place.

    transformers before 5.18 takes the first for the last; before 5.21 it leaves the first out of a text.
    """
    for name in ("bos_token", "eos_token"):
        number = fields.get(f"tokenizer.ggml.{name}_id")
        if number is not None and getattr(tokenizer, f"{name}_id") != number:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    if fields.get("tokenizer.ggml.model") == "llama":
        begins = fields.get("tokenizer.ggml.add_bos_token", True)
        if tokenizer.add_bos_token != begins:
            tokenizer.add_bos_token = begins
    return tokenizer


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


def stored_tokens(path: Path) -> tuple[dict[str, int], dict[str, int | None], str | None] | None:
    """Ids by token, special ids by name, and the chat template, as the file's metadata says; None without a tokenizer.

    Nothing of it is interpreted, so that it can be read where no library builds a tokenizer of it.
    """
    from gguf import GGUFReader

    fields = read_gguf_header(path).fields
    if "tokenizer.ggml.model" not in fields:
        return None
    listed = GGUFReader(path).fields.get("tokenizer.ggml.tokens")
    tokens = [] if listed is None else listed.contents()
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
    special = {name: fields.get(f"tokenizer.ggml.{short}_token_id") for name, short in names.items()}
    return {str(token): number for number, token in enumerate(tokens)}, special, fields.get("tokenizer.chat_template")


def stored_token_types(path: Path) -> list[int]:
    """Type of each token, as ggml numbers them: 1 is text, 3 is control; empty where the file says nothing."""
    from gguf import GGUFReader

    listed = GGUFReader(path).fields.get("tokenizer.ggml.token_type")
    return [] if listed is None else [int(number) for number in listed.contents()]
