"""Groups along outputs: one scale for some rows of one input column (AdaDim, Heo et al. 2024, arXiv:2309.15531)."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.errors import output_error
from outlierq.ops.grid import in_groups, minmax_grid


def transposed_scheme(scheme: QuantScheme, rows: int) -> QuantScheme:
    """The scheme of a transposed weight of so many rows: its group size, or the largest part that divides them."""
    return scheme if scheme.group_size is None else replace(scheme, group_size=gcd(scheme.group_size, rows))


def nearest(w: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """`w` [out, in] rounded to its min-max grid, float32, with groups along inputs."""
    return minmax_grid(w, scheme).round(in_groups(w, scheme)).reshape(w.shape)


def nearest_by_output(w: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The same, [out, in], with groups along outputs."""
    across = w.T.contiguous()
    return nearest(across, transposed_scheme(scheme, len(w))).T.contiguous()


def dimension_ratio(w: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme) -> float:
    """Output error with groups along outputs over that with groups along inputs; 1 where both are exact.

    w: [out, in] float32; hessian: [in, in]. Well below 1, single input channels spoil the groups that they are in.
    """
    along = output_error(nearest(w, scheme) - w, hessian).item()
    across = output_error(nearest_by_output(w, scheme) - w, hessian).item()
    return across / along if along > 0 else 1.0
