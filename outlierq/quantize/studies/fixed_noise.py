"""NoisyQuant: when a fixed noise before a rounder lowers its error. Liu et al. 2023, CVPR, arXiv:2211.16056.

The noise N ~ U(-n, n) is drawn once and taken off again behind the product, where it is a bias. Between the steps of a
rounder it trades the error of values near the edge of a bin against that of values in the middle. Nothing here adds
noise: values of language models peak at 0, the middle of a bin, and rounding by token has no fixed step to fit it to.
"""

from __future__ import annotations

import torch


def helps(distance: torch.Tensor, noise: float, step: float) -> torch.Tensor:
    """Whether noise lowers the expected squared error of values so far from the nearest edge of a bin, any shape: iff
    d <= n (1 - sqrt(2 n / (3 step))). noise: n, at most half a step."""
    reach: float = noise * (1 - (2 * noise / (3 * step)) ** 0.5)
    return distance <= reach


def change(distance: torch.Tensor, noise: float, step: float) -> torch.Tensor:
    """By how much the expected squared error changes: -step d^2 / (2 n) + step d + n^2 / 3 - n step / 2 within the
    reach of the noise, n^2 / 3 beyond it; of the same shape."""
    near = -step * distance**2 / (2 * noise) + step * distance + noise**2 / 3 - noise * step / 2
    return torch.where(distance <= noise, near, torch.full_like(distance, noise**2 / 3))


def mean_change(x: torch.Tensor, noise: float, step: float) -> float:
    """The mean of it over values of any shape that are rounded to multiples of a step: below 0 where noise helps."""
    inside = (x.double() / step).remainder(1.0)
    return change((inside - 0.5).abs() * step, noise, step).mean().item()
