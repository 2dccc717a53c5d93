"""A part of many rows."""

from __future__ import annotations

import torch


def spread(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows [n, ...], evenly spread from the first to the last."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
