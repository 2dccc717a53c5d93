"""Tokens that the calibration text does not hold: how often other text has such tokens, and windows of them.

The first block reads what the table of embeddings says of a token, so its inputs are known for tokens of which there is
no text. Left out, they lie in directions that a method takes for free ones, and errors are moved there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.windows import begun, room_beside

if TYPE_CHECKING:
    import torch

# So many say what they have in common, four and more for each direction of most inputs, and run in no time.
MOST_TOKENS = 1 << 14
# Text of other kinds holds 1.5 to 1.8 times as many new tokens as one window holds to the others, and errors were least
# at twice as many. A text of which every second token is new says little, not even of how much is new.
OF_OTHER_KINDS, MOST_SHARE = 2.0, 0.5
ALIKE = 2.0**-6  # relative; twice what one rounding to bfloat16 can change


@dataclass(frozen=True)
class Unseen:
    """Tokens that the text does not hold. windows: LongTensor [n, tokens] of them, no longer than those of text.

    share: of the tokens of other text that are such tokens, 0 to 1. skip: how many begin each window and do not count.
    kinds: how many there are in all.
    """

    windows: torch.Tensor
    share: float
    skip: int
    kinds: int

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of what the first block sees are the {self.kinds:,} tokens that the text does not hold"
        )


def unseen_tokens(
    tokenizer: Any, ids: torch.Tensor, rows: int | None, opening: Sequence[int], seed: int | None
) -> Unseen | None:
    """What windows of text `ids` [windows, tokens] do not hold; None where next to nothing is missing.

    rows: of the table of embeddings, None where it is not known. opening: tokens that begin each window; the first one
    of a window does not count in any case, it has nothing to attend to. There are not more windows than of text. The
    last one is the first with every second token replaced by another of them, for `reads_ids_alone`.
    """
    import torch

    known, share = ordinary_tokens(tokenizer, rows), share_of_unseen(ids)
    kinds = known[~torch.isin(known, ids)]
    if len(kinds) < 2 or not share:
        return None
    order = kinds[torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed or 0))]
    body = room_beside(opening, ids.shape[1])
    count = max(1, min(len(ids), MOST_TOKENS // body, -(-len(order) // body)))
    windows = order.repeat(-(-count * body // len(order)))[: count * body].view(count, body)
    other = windows[:1].clone()
    other[:, 1::2] = order[(torch.arange(body)[1::2] + 1) % len(order)]
    return Unseen(begun(torch.cat([windows, other]), opening), share, max(1, len(opening)), len(kinds))


def ordinary_tokens(tokenizer: Any, rows: int | None) -> torch.Tensor:
    """Sorted ids [n] of all tokens that stand for text: neither special ones nor rows that pad the table."""
    import torch

    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
    ids = {id for id in tokenizer.get_vocab().values() if rows is None or id < rows} - special
    return torch.tensor(sorted(ids), dtype=torch.long)


def share_of_unseen(ids: torch.Tensor) -> float:
    """How much of other text is tokens that `ids` [windows, tokens] does not hold, 0 to 1.

    From how much of each window no other window holds, as each is text to the others. Good and Turing's estimate
    (Biometrika 40, 1953), which counts tokens that occur once, is 0.6 of that: what occurs twice in one document and in
    no other is as new to the others. Text of other kinds has more (`OF_OTHER_KINDS`; docs/what-we-learned.md).
    """
    import torch

    _, place = ids.unique(return_inverse=True)
    windows = torch.zeros(int(place.max()) + 1, dtype=torch.long)
    for window in place:
        windows[window.unique()] += 1
    alone = (windows == 1)[place].double().mean().item() if len(ids) > 1 else 0.0
    return min(MOST_SHARE, OF_OTHER_KINDS * alone)


def reads_ids_alone(windows: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether what enters the first block depends on each token (and its place) alone.

    windows: [n, tokens], as `unseen_tokens` made them: the last is the first with every second token replaced. hidden:
    [n, tokens, ...] of them. Equal tokens must have equal hidden states there, and others not.
    """
    if hidden.shape[:2] != windows.shape:
        return False
    one, other, same = hidden[0].float(), hidden[-1].float(), windows[0] == windows[-1]
    change = (one - other).flatten(1).norm(dim=1) / one.flatten(1).norm(dim=1).clamp_min(1e-30)
    return bool(same.any() and (change[same] <= ALIKE).all() and (change[~same] > ALIKE).any())
