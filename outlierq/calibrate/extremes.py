"""Tables of extreme entries: which tokens hold the largest values, and in which channel (`TOP_COLUMNS`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.stats import largest_entries

if TYPE_CHECKING:
    import torch


class Places:
    """Where the tokens of one batch stand, and which they are.

    first_sequence, first_position: of the batch's first token. ids: [sequences, tokens] of the whole token set; without
    them token ids are -1.
    """

    def __init__(self, ids: torch.Tensor | None, first_sequence: int, first_position: int = 0):
        self.ids, self.first_sequence, self.first_position = ids, first_sequence, first_position

    def of(self, token: torch.Tensor, length: int) -> list[torch.Tensor]:
        """Sequence, position and token id of flat token numbers in a batch whose sequences have `length` tokens."""
        import torch

        token = token.cpu()
        sequence = self.first_sequence + token // length
        position = self.first_position + token % length
        ids = torch.full_like(token, -1) if self.ids is None else self.ids[sequence, position]
        return [sequence, position, ids]


def top_tokens(x: torch.Tensor, token_max: torch.Tensor, places: Places, count: int) -> torch.Tensor:
    """[<= count, 6], the tokens of a batch with the largest |x|, each with its largest entry.

    x: [sequences, tokens, K]. token_max: [sequences, tokens], max over channels of |x|.
    """
    tokens = _largest_tokens(token_max, count)
    return _entries(x, tokens, x.flatten(0, 1)[tokens].abs().argmax(1), places)


def top_entries(x: torch.Tensor, token_max: torch.Tensor, places: Places, count: int) -> torch.Tensor:
    """[<= count, 6], the largest entries of a batch; a token may be there with several channels.

    They lie in the `count` tokens with the largest maxima. Arguments as for `top_tokens`.
    """
    tokens = _largest_tokens(token_max, count)
    channels = x.shape[-1]
    rows = x.flatten(0, 1)[tokens].abs().flatten()
    best = rows.argsort(descending=True, stable=True)[:count]
    return _entries(x, tokens[best // channels], best % channels, places)


def top_of_sequences(x: torch.Tensor, token_max: torch.Tensor, places: Places) -> torch.Tensor:
    """[sequences, 6], the largest entry of every sequence of a batch. Arguments as for `top_tokens`."""
    import torch

    count, length = token_max.shape
    tokens = token_max.argmax(1) + torch.arange(count, device=token_max.device) * length
    return _entries(x, tokens, x.flatten(0, 1)[tokens].abs().argmax(1), places)


def add_to_top(top: torch.Tensor | None, new: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest entries of both tables, [n, 6] each."""
    import torch

    return largest_entries(new if top is None else torch.cat([top, new]), count)


def _largest_tokens(token_max: torch.Tensor, count: int) -> torch.Tensor:
    """Flat numbers of the tokens with the largest maxima. Sorted stably: equal ones in the order of the text."""
    return token_max.flatten().argsort(descending=True, stable=True)[:count]


def _entries(x: torch.Tensor, token: torch.Tensor, channel: torch.Tensor, places: Places) -> torch.Tensor:
    """[n, 6] rows of `TOP_COLUMNS` for flat token numbers and channels of x [sequences, tokens, K]."""
    import torch

    rows = x.flatten(0, 1)[token].float()
    value = rows.gather(1, channel[:, None])[:, 0]
    columns = [*places.of(token, x.shape[1]), channel, value, rows.abs().median(1).values]
    return torch.stack([column.float().cpu() for column in columns], dim=1)
