"""Integer grids, one group at a time in float64: every code is tried, every scale of a fine scan is tried."""

from __future__ import annotations

import torch


def grid_values(scale: float, zero_point: float, code_range: tuple[int, int]) -> torch.Tensor:
    """All weights that the codes of one group can stand for, float64."""
    low, high = code_range
    return (torch.arange(low, high + 1, dtype=torch.float64) - zero_point) * scale


def nearest_distance(group: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Distance of every weight of a group to the closest grid value."""
    return (group.double()[:, None] - values[None, :]).abs().min(1).values


def rounding_error(group: torch.Tensor, block: torch.Tensor, values: torch.Tensor) -> float:
    """d H d^T of rounding every weight of a group to the closest grid value."""
    change = values[(group.double()[:, None] - values[None, :]).abs().argmin(1)] - group.double()
    return (change @ block.double() @ change).item()


def least_error_by_scan(group: torch.Tensor, block: torch.Tensor, bits: int, *, steps: int = 400) -> float:
    """The least error over `steps` symmetric grids of either sign, from a fifth of the min-max scale to beyond it."""
    code_range = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    widest = group.double().abs().max().item() / code_range[1]
    scales = torch.linspace(0.2 * widest, 1.1 * widest, steps, dtype=torch.float64).tolist()
    return min(rounding_error(group, block, grid_values(sign * s, 0, code_range)) for s in scales for sign in (1, -1))


def range_error_by_scan(group: torch.Tensor, block: torch.Tensor, bits: int, *, steps: int = 30) -> float:
    """The least error over asymmetric grids: every pair of a shrunken minimum and a shrunken maximum."""
    code_max = (1 << bits) - 1
    low, high = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
    factors = torch.linspace(0.3, 1.0, steps, dtype=torch.float64).tolist()
    errors = []
    for shrink_low in factors:
        for shrink_high in factors:
            scale = (high * shrink_high - low * shrink_low) / code_max
            zero_point = round(-low * shrink_low / scale)
            errors.append(rounding_error(group, block, grid_values(scale, zero_point, (0, code_max))))
    return min(errors)
