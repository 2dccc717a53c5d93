"""The text of single tokens, for reports that show where something happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from outlierq.load.model.foreign import tokenizer_faults
from outlierq.load.source.folder import small_bytes

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

TOKENIZER = "tokenizer.json"
LARGEST_TOKENIZER = 300_000_000  # bytes; a vocabulary of 256,000 tokens takes 35 million


def token_texts(checkpoint: Checkpoint, tokens: Iterable[int]) -> dict[int, str]:
    """Token id -> its text, special tokens included. SourceError when there is no tokenizer.

    A tokenizer.json is read with the tokenizers library alone: importing transformers for a dozen tokens takes seconds.
    """
    ids = sorted({token for token in tokens if 0 <= token < 1 << 32})
    path = checkpoint.path / TOKENIZER
    if path.is_file():
        from tokenizers import Tokenizer

        raw = small_bytes(checkpoint.path, TOKENIZER, LARGEST_TOKENIZER)
        with tokenizer_faults(checkpoint.source):
            tokenizer = Tokenizer.from_buffer(raw)
            return {token: tokenizer.decode([token], skip_special_tokens=False) for token in ids}
    from outlierq.load.whole import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    return {token: tokenizer.decode([token]) for token in ids}
