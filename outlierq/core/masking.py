"""Masked diffusion: models that see later tokens and fill in what is hidden behind a mask token.

LLaDA: a share t ~ U(0, 1) of a text's tokens is hidden, and all of them are predicted at once. Nie et al. 2025,
arXiv:2502.09992. How they are quantized: arXiv:2508.14896.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.windows import limit_of

if TYPE_CHECKING:
    import torch

PROBE_TOKENS = 16  # of a text, to see whether the last one changes what a model makes of those before it
# Of the norm of what is made of them. In bfloat16 a mixture of experts rounds otherwise in other company: 1e-4.
LEAST_CHANGE = 1e-3


@dataclass(frozen=True)
class Hidden:
    """Which tokens of some windows are hidden. places: bool [windows, tokens]. token: what stands there instead."""

    places: torch.Tensor
    token: int

    def over(self, ids: torch.Tensor) -> torch.Tensor:
        """The windows [windows, tokens] with these tokens hidden."""
        return ids.masked_fill(self.places.to(ids.device), self.token)


def hidden_at_random(ids: torch.Tensor, token: int, opening: int, seed: int | None = 0) -> Hidden:
    """Hide n tokens of every window [windows, tokens], n uniform between 1 and all; never the first or an opening one.

    Over the windows n is spread evenly and shuffled, so that few windows see every share alike. opening: tokens that
    every window begins with.
    """
    import torch

    windows, length = ids.shape
    generator = torch.Generator().manual_seed(seed or 0)
    first = max(1, opening)  # some models predict a token from the place before it
    shares = (torch.randperm(windows, generator=generator) + 0.5) / windows
    counts = (shares * (length - first)).long().clamp(min=1)
    order = torch.rand(windows, length - first, generator=generator).argsort(1).argsort(1)
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[:, first:] = order < counts[:, None]
    return Hidden(places, token)


def sees_later_tokens(run: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> bool:
    """Whether the last token changes what `run` makes of earlier ones: [1, tokens] ids to [1, tokens, ...] numbers."""
    import torch

    other = ids.clone()
    other[:, -1] = (ids[:, -1] - 1).abs()  # any other one
    one, two = run(ids), run(other)
    axis = 1 if one.shape[:2] == ids.shape else list(one.shape).index(ids.shape[1])
    before = torch.arange(ids.shape[1] - 1, device=one.device)
    one, two = (made.float().index_select(axis, before) for made in (one, two))
    return bool((two - one).norm() > LEAST_CHANGE * one.norm())


def mask_token(model: Any, tokenizer: Any, source: str) -> int | None:
    """The id of the mask token: of the model's config, else of the tokenizer; None where neither has one.

    SourceError for one that the tokenizer does not have. source: the name of the model, for the message.
    """
    named, own = limit_of(model, "mask_token_id"), tokenizer.mask_token_id
    token = own if named is None else named
    if token is None or (0 <= token < len(tokenizer) and tokenizer.convert_ids_to_tokens(token) is not None):
        return token
    with_own = f"the tokenizer's {tokenizer.mask_token!r}" if own is not None else "a token that it has"
    raise SourceError(
        f"config.json of {source} names the mask token {token}, which its tokenizer of {len(tokenizer)} tokens does "
        "not have",
        hint=f"set mask_token_id in config.json to {'that of ' if own is None else f'{own}, '}{with_own}",
    )


def no_mask_token(source: str) -> SourceError:
    """A model that sees later tokens, and nobody says behind what they are hidden."""
    return SourceError(
        f"{source} sees later tokens, so it does not predict the next one, and neither config.json nor the tokenizer "
        "names a mask token",
        hint="set mask_token_id in config.json; recipes without calibration (rtn-w4, rtn-w8) need none",
    )
