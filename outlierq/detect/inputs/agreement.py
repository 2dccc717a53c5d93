"""How far the statistics of one input agree between two calibration texts. Williams and Aletras 2023, arXiv:2311.09755;
Paglieri et al. 2024, arXiv:2405.20835."""

from __future__ import annotations

import torch

from outlierq.core.stats import InputStats

TOP_SHARE = 0.01  # of the channels: those that matter for smoothing and for splits


def rank_correlation(one: InputStats, other: InputStats) -> float:
    """Spearman's rho of abs_max [K] over the channels; 1 where both rank them alike."""
    ranks = [stats.need("abs_max").argsort().argsort().double() for stats in (one, other)]
    return _cosine(*(each - each.mean() for each in ranks))


def shared_outliers(one: InputStats, other: InputStats) -> float:
    """Jaccard index, 0..1, of the top 1 % of the channels by abs_max [K] (at least one)."""
    values = [stats.need("abs_max") for stats in (one, other)]
    count = max(1, round(TOP_SHARE * len(values[0])))
    top = [set(each.topk(count).indices.tolist()) for each in values]
    return len(top[0] & top[1]) / len(top[0] | top[1])


def scale_ratio(one: InputStats, other: InputStats) -> float:
    """The larger static scale of an input [K] over the smaller one; 1 where both are alike."""
    largest = [stats.need("abs_max").max().item() for stats in (one, other)]
    return max(largest) / min(largest) if min(largest) > 0 else 1.0


def energy_cosine(one: InputStats, other: InputStats) -> float:
    """Cosine of the mean squares [K] of the channels."""
    return _cosine(one.need("sum_sq").double(), other.need("sum_sq").double())


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two vectors [K]; 1 where one of them is zero."""
    norm = (one.norm() * other.norm()).item()
    return (one @ other).item() / norm if norm > 0 else 1.0
