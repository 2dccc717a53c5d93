"""TanQ of DopQ-ViT: levels for softmax that lie denser near 1, by a tangent. Yang et al. 2024, arXiv:2408.03291.

A study: no program that serves language models keeps softmax anywhere. The paper was not to be had; this is the form
that its abstract tells, u = tan(a x) / tan(a), whose inverse is an arcus tangent, u in even steps.
"""

from __future__ import annotations

import torch


def tangent_levels(bits: int, bend: float) -> torch.Tensor:
    """The 2^bits levels on [0, 1], ascending, from 0 to 1. bend: a, above 0 and below pi / 2; small ones are even."""
    even = torch.linspace(0, 1, 2**bits, dtype=torch.float64)
    ratio = torch.tan(torch.tensor(bend, dtype=torch.float64))
    return torch.atan(even * ratio) / bend


def even_levels(bits: int) -> torch.Tensor:
    """The same in even steps."""
    return torch.linspace(0, 1, 2**bits, dtype=torch.float64)


def log_levels(bits: int) -> torch.Tensor:
    """The same in powers of two, and 0: what FQ-ViT and others take."""
    return torch.cat([torch.zeros(1), 2.0 ** -torch.arange(2**bits - 2, -1, -1)]).double()


def on_levels(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The nearest level of every probability, of any shape."""
    levels = levels.to(x)
    return levels[torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)]


def best_tangent(x: torch.Tensor, bits: int, steps: int = 15) -> torch.Tensor:
    """The levels with the least squared error over some probabilities."""
    bends = torch.linspace(0.1, 1.5, steps).tolist()
    errors = [(on_levels(x, tangent_levels(bits, bend)) - x).square().sum().item() for bend in bends]
    return tangent_levels(bits, bends[errors.index(min(errors))])
