"""The sweep of GPTQ over the columns of some rows, by the factor R (Frantar et al. 2022, arXiv:2210.17323).

All is [in, rows], in the order of the factor. What the columns before a block pull on it, the sum over i < j of
(W - Q)_i R_ij, is added up when the block is reached: first over all columns before the 512 that it is one of, in one
product, of bfloat16 operands where the processor has them; then over those among the 512 that come before it, in one
product; then over those inside it, one after the other. In a product the order is that of the library.
"""

from __future__ import annotations

import torch

from outlierq.core.errors import NumbersError
from outlierq.core.scheme import QuantScheme
from outlierq.ops.grid import Grid, from_groups, in_groups
from outlierq.ops.precision import Operand
from outlierq.ops.search.columns import ColumnGrid, sweep_block
from outlierq.ops.solve import Factor, factored

# Columns of a block, and of several together, on which all columns before them pull by one product.
BLOCK, WIDE = 128, 512
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
    lost = Operand(values, len(values))
    for wide in factor.blocks(WIDE):
        errors[wide] = lost.times(factor.upper[: wide.start, wide].T, slice(0, wide.start))
        for block in factor.blocks(BLOCK, wide):
            near = slice(wide.start, block.start)
            errors[block].addmm_(factor.upper[near, block].T, values[near])
            columns, corner = factor.order[block], factor.upper[block, block]
            codes[columns] = sweep_block(grid.part(columns), values[block], errors[block], corner)
        lost.renew(wide)
    return codes, errors


def residuals(values: torch.Tensor, errors: torch.Tensor, factor: Factor) -> torch.Tensor:
    """H (W - Q)^T = R errors - damping (W - Q)^T, [in, rows] in the columns' own order."""
    found, right = torch.empty_like(errors), Operand(errors, len(errors))
    right.renew(slice(0, len(errors)))
    for wide in factor.blocks(WIDE):
        far = slice(wide.stop, len(errors))
        pulled = right.times(factor.upper[wide, far], far)
        for block in factor.blocks(BLOCK, wide):
            near = slice(block.start, wide.stop)
            part = pulled[block.start - wide.start : block.stop - wide.start]
            part.addmm_(factor.upper[block, near], errors[near]).sub_(values[block], alpha=factor.damping)
        found[factor.order[wide]] = pulled
    return found


def squared_errors(values: torch.Tensor, errors: torch.Tensor, factor: Factor) -> torch.Tensor:
    """[rows] float64: (W - Q) H (W - Q)^T of each row."""
    return sum_of_squares(errors) - factor.damping * sum_of_squares(values)


def sum_of_squares(columns: torch.Tensor) -> torch.Tensor:
    """[rows] float64: sums of squares over [columns, rows]; of 128 columns in float32."""
    return sum((part.square().sum(0).double() for part in columns.split(128)), torch.zeros((), dtype=torch.float64))


def compensated(w: torch.Tensor, grid: Grid, hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """Codes [out, in] float32 of a weight on a grid by one sweep, columns of large inputs first; or the nearest ones.

    The latter where codes stand for several weights, and where no damping gives H a factor. w: [out, in] float32.
    """
    try:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = factored(hessian, damp, order) if grid.scheme.vector == 1 else None
    except NumbersError:
        factor = None
    if factor is None:
        return from_groups(grid.encode(in_groups(w, grid.scheme)), w.shape[1])
    codes, _ = sweep(w.T[factor.order], ColumnGrid.of(grid, w.shape[1]), factor)
    return codes.T.contiguous()
