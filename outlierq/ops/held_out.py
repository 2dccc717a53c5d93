"""Kept tokens as text that a choice did not see: they are taken out of the hessian, and judge what was made with it."""

from __future__ import annotations

import torch

from outlierq.core.notes import note
from outlierq.core.stats import InputStats

LEAST_TOKENS = 4  # times as many as are held out, or nothing is


def without_rows(stats: InputStats) -> tuple[torch.Tensor, torch.Tensor]:
    """The hessian [in, in] of the tokens that were not kept, and the kept ones [rows, in] float32.

    With few tokens the hessian is that of all, which is noted.
    """
    hessian, rows = stats.need("hessian"), stats.need("rows").float()
    if stats.tokens < LEAST_TOKENS * len(rows):
        note(f"{stats.tokens} tokens are too few to hold {len(rows)} of them out")
        return hessian, rows
    rest = stats.tokens - len(rows)
    return (hessian * (stats.tokens / rest)).addmm_(rows.T, rows, alpha=-1 / rest), rows
