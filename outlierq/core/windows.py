"""Whether token windows fit a model: its positions and its vocabulary, told before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError

if TYPE_CHECKING:
    import torch


def check_length(model: torch.nn.Module, length: int, setting: str) -> None:
    """OutlierqError when windows of `length` tokens exceed the positions that the model's config names.

    A table of positions has no rows beyond them; rotary embeddings go on, but the model was never trained there.
    setting: what to change.
    """
    positions = _limit(model, "max_position_embeddings")
    if positions is not None and length > positions:
        raise OutlierqError(
            f"windows of {length} tokens exceed the model's {positions} positions",
            hint=f"use windows of at most {positions} tokens ({setting})",
        )


def check_ids(model: torch.nn.Module, ids: torch.Tensor, tokenizer_size: int | None = None) -> None:
    """OutlierqError when token ids have no row in the model's table of embeddings.

    ids: of any shape. tokenizer_size: for the message.
    """
    rows = _embedded(model)
    lowest, highest = int(ids.min()), int(ids.max())
    if rows is not None and not 0 <= lowest <= highest < rows:
        known = "" if tokenizer_size is None else f"; the tokenizer has {tokenizer_size} tokens"
        raise OutlierqError(
            f"token id {lowest if lowest < 0 else highest} does not fit the model's vocabulary of {rows}{known}",
            hint="the tokenizer does not belong to this model, or tokens were added to it without rows for them",
        )


def _limit(model: Any, name: str) -> int | None:
    """The number that the config of the language model gives under a name, None where it gives none."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _embedded(model: Any) -> int | None:
    """Rows of the table of embeddings; what the config says where a model does not show its table."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return _limit(model, "vocab_size")
