"""Token windows as a model is served them: how they begin, and whether they fit its positions and its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError

if TYPE_CHECKING:
    import torch

PROBE = "a"  # a text that shows what is put before and behind it


def opening_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text by itself: a begin-of-text token, nothing, or several."""
    text = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(PROBE)["input_ids"])
    starts = range(len(whole) - len(text) + 1)
    return whole[: next((start for start in starts if whole[start : start + len(text)] == text), 0)]


def begun(windows: torch.Tensor, opening: Sequence[int]) -> torch.Tensor:
    """Windows [n, tokens] with the opening tokens before each: [n, len(opening) + tokens]."""
    import torch

    before = torch.tensor(list(opening), dtype=windows.dtype)
    return torch.cat([before.expand(len(windows), -1), windows], dim=1)


def room_beside(opening: Sequence[int], length: int) -> int:
    """Tokens of text in a window of `length`; OutlierqError where the opening leaves none."""
    if length <= len(opening):
        raise OutlierqError(
            f"windows of {length} tokens have no room for text: the tokenizer begins each with {len(opening)}",
            hint="use longer windows",
        )
    return length - len(opening)


def check_length(model: torch.nn.Module, length: int, setting: str) -> None:
    """OutlierqError when windows of `length` tokens exceed the positions that the model's config names.

    A table of positions has no rows beyond them; rotary embeddings go on, but the model was never trained there.
    setting: what to change.
    """
    positions = limit_of(model, "max_position_embeddings")
    if positions is not None and length > positions:
        raise OutlierqError(
            f"windows of {length} tokens exceed the model's {positions} positions",
            hint=f"use windows of at most {positions} tokens ({setting})",
        )


def check_ids(model: torch.nn.Module, ids: torch.Tensor, tokenizer_size: int | None = None) -> None:
    """OutlierqError when token ids have no row in the model's table of embeddings.

    ids: of any shape. tokenizer_size: for the message.
    """
    rows = embedding_rows(model)
    rows = limit_of(model, "vocab_size") if rows is None else rows  # what the config says of a table that is not shown
    lowest, highest = int(ids.min()), int(ids.max())
    if rows is not None and not 0 <= lowest <= highest < rows:
        known = "" if tokenizer_size is None else f"; the tokenizer has {tokenizer_size} tokens"
        raise OutlierqError(
            f"token id {lowest if lowest < 0 else highest} does not fit the model's vocabulary of {rows}{known}",
            hint="the tokenizer does not belong to this model, or tokens were added to it without rows for them",
        )


def limit_of(model: Any, name: str) -> int | None:
    """The number that the config of the language model gives under a name, None where it gives none."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def embedding_rows(model: Any) -> int | None:
    """Rows of the model's table of embeddings; None when its class shows none."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    # The second is how transformers says that a class has no table; the first is a class that transformers does not
    # know, or a table of another kind.
    except (AttributeError, NotImplementedError):
        return None
