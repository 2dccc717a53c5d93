"""The final logits of the original model at a sample of positions, from the hidden states that left the last block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlierq.core.errors import NumbersError
from outlierq.core.measured.logits import LogitSample

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.runner import BlockRunner, HiddenStates

POSITIONS = 512
TOP_LOGITS = 1000


def sample_logits(
    runner: BlockRunner,
    ids: torch.Tensor,
    hidden: HiddenStates,
    *,
    positions: int = POSITIONS,
    top: int = TOP_LOGITS,
    seed: int = 0,
    part: tuple[int, int] | None = None,
) -> LogitSample | None:
    """Run what follows the blocks on `hidden`, which holds the outputs of the last one, at some positions.

    ids: [sequences, tokens] of the whole token set, or of a part of it. part: number of its first sequence, and how
    many sequences there are in the whole; None when it is all. positions: how many in the whole (fewer if the text is
    shorter). top: tokens kept at each, at most the vocabulary. None when no position is in the part. NumbersError when
    a logit is not finite.
    """
    import torch

    first, sequences = part or (0, len(ids))
    places = sample_places((sequences, ids.shape[1]), positions, seed) - torch.tensor([first, 0])
    places = places[(places[:, 0] >= 0) & (places[:, 0] < len(ids))]
    rows = []
    with runner.tail(ids, hidden) as logits_at:
        for batch in range(len(hidden)):
            start = batch * hidden.batch_size
            here = places[(places[:, 0] >= start) & (places[:, 0] < start + hidden.batch_size)]
            if len(here):
                logits = logits_at(batch, here - torch.tensor([start, 0])).float()
                if not logits.isfinite().all():
                    bad = int((~logits.isfinite()).sum())
                    raise NumbersError(f"{bad} of {logits.numel()} logits are NaN or Inf in batch {batch}")
                total = logits.logsumexp(-1)
                values, tokens = logits.topk(min(top, logits.shape[-1]))
                rows.append((tokens.int().cpu(), (values - total[:, None]).cpu(), total.cpu()))
    if not rows:
        return None
    tokens, values, totals = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return LogitSample((places[:, 0] + first).int(), places[:, 1].int(), tokens, values, totals)


def sample_places(shape: tuple[int, int], count: int, seed: int) -> torch.Tensor:
    """[n, 2] sequence and position, in the order of the text: as many of each sequence as of any other, give or take
    one, drawn without repetition. shape: sequences and tokens of each."""
    import torch

    sequences, length = shape
    count = min(count, sequences * length)
    generator = torch.Generator().manual_seed(seed)
    places = []
    for sequence in range(sequences):
        share = (sequence + 1) * count // sequences - sequence * count // sequences
        drawn = torch.randperm(length, generator=generator)[:share].sort().values
        places.append(torch.stack([torch.full_like(drawn, sequence), drawn], dim=1))
    return torch.cat(places)
