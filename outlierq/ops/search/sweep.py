"""The sweep of GPTQ over the columns of some rows, by the factor R (Frantar et al. 2022, arXiv:2210.17323).

All is [in, rows], in the order of the factor. What the columns before a block pull on it is one product, taken when the
block is reached: sum over i < j of (W - Q)_i R_ij. The order of sums is that of the product of the library in use, over
the columns before the block; then that of the columns inside it, one after the other.
"""

from __future__ import annotations

import torch

from outlierq.core.scheme import QuantScheme
from outlierq.ops.search.columns import ColumnGrid, sweep_block
from outlierq.ops.solve import Factor

# Rows that are solved at a time by one thread. Half as many take a tenth more time for their products; twice as many
# take twice the memory, four matrices of [rows, in], and save nothing.
PANEL_ROWS = 512


def panel_rows(scheme: QuantScheme) -> int:
    """So many rows, or the next number of whole blocks where rows share scales."""
    together = 1 if scheme.block is None else scheme.block[0]
    return max(1, PANEL_ROWS // together) * together


def sweep(values: torch.Tensor, grid: ColumnGrid, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float32 and errors (W - Q) R, both [in, rows]; `values` W [in, rows] become W - Q.

    The codes are in the columns' own order, the others in the factor's.
    """
    codes, errors = torch.empty_like(values), torch.empty_like(values)
    for block in factor.blocks():
        torch.mm(factor.upper[: block.start, block].T, values[: block.start], out=errors[block])
        columns = factor.order[block]
        corner = factor.upper[block, block]
        codes[columns] = sweep_block(grid.part(columns), values[block], errors[block], corner)
    return codes, errors


def residuals(values: torch.Tensor, errors: torch.Tensor, factor: Factor) -> torch.Tensor:
    """H (W - Q)^T = R errors - damping (W - Q)^T, [in, rows] in the columns' own order."""
    found = torch.empty_like(errors)
    for block in factor.blocks():
        pulled = factor.upper[block, block.start :] @ errors[block.start :]
        found[factor.order[block]] = pulled.sub_(values[block], alpha=factor.damping)
    return found


def squared_errors(values: torch.Tensor, errors: torch.Tensor, factor: Factor) -> torch.Tensor:
    """[rows] float64: (W - Q) H (W - Q)^T of each row."""
    return _squares(errors) - factor.damping * _squares(values)


def output_power(values: torch.Tensor, factor: Factor) -> torch.Tensor:
    """[rows] float64: W H W^T of each row of W, `values` [in, rows] in the order of the factor."""
    power = -factor.damping * _squares(values)
    for block in factor.blocks():
        power += _squares(factor.upper[: block.stop, block].T @ values[: block.stop])
    return power


def _squares(columns: torch.Tensor) -> torch.Tensor:
    """[rows] float64: sums of squares over [columns, rows]; of 128 columns in float32."""
    return sum((part.square().sum(0).double() for part in columns.split(128)), torch.zeros((), dtype=torch.float64))
