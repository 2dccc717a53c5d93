"""The power of a weight's output, which its error is told against: exact, or for wide weights from some of the rows.

Exactly, it takes as many operations as the sweep of GPTQ. What a row has is foretold by the few directions in which
most inputs lie (the approximation of Nystroem by random ones, Williams and Seeger 2001) and the diagonal of the rest;
how far that is off for every eighth row corrects it for all.
"""

from __future__ import annotations

import torch

from outlierq.ops.precision import Operand
from outlierq.ops.search.sweep import BLOCK, WIDE, sum_of_squares
from outlierq.ops.solve import Factor

# From this width on, one row of so many is worked out, and so many directions stand for the inputs. Sums over a weight
# are then within a hundredth of the exact ones (tests/test_ops_power.py).
WIDE_WEIGHT, EVERY, DIRECTIONS = 4096, 8, 32


class OutputPower:
    """W H W^T of rows of weights of one hessian [in, in]; factor: of it."""

    def __init__(self, hessian: torch.Tensor, factor: Factor):
        self.factor = factor
        self.known = _main_directions(hessian, factor.order) if len(hessian) >= WIDE_WEIGHT else None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """[rows] float64 for W `values` [in, rows] in the order of the factor."""
        if self.known is None:
            return output_power(values, self.factor)
        directions, rest = self.known
        foretold = (directions.T @ values).square().sum(0).double() + (rest @ values.square()).double()
        exact = output_power(values[:, ::EVERY].contiguous(), self.factor)
        known = foretold[::EVERY].sum()
        return foretold * (exact.sum() / known) if known > 0 else output_power(values, self.factor)


def _main_directions(hessian: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L [in, 32] with H near L L^T and the diagonal [in] of H - L L^T, which is not negative; columns in an order."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(hessian), DIRECTIONS, generator=random).to(hessian.device)
    seen = hessian @ drawn
    values, vectors = torch.linalg.eigh((drawn.T @ seen).double())
    large = values > 1e-6 * values[-1].clamp(min=0)
    root = (vectors[:, large] * values[large].rsqrt()).float()
    found = (seen @ root)[order]
    return found, (hessian.diagonal()[order] - found.square().sum(1)).clamp(min=0)


def output_power(values: torch.Tensor, factor: Factor) -> torch.Tensor:
    """[rows] float64: W H W^T of each row of W, `values` [in, rows] in the order of the factor."""
    power, right = -factor.damping * sum_of_squares(values), Operand(values, len(values))
    right.renew(slice(0, len(values)))
    for wide in factor.blocks(WIDE):
        product = right.times(factor.upper[: wide.start, wide].T, slice(0, wide.start))
        for block in factor.blocks(BLOCK, wide):
            near = slice(wide.start, block.stop)
            part = product[block.start - wide.start : block.stop - wide.start]
            part.addmm_(factor.upper[near, block].T, values[near])
        power += sum_of_squares(product)
    return power
