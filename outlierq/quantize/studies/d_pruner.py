"""D-Pruner: keep what general and domain text both need. Zhang et al. 2024, arXiv:2405.06275.

The paper's code was never released. Its importance is a Taylor expansion of the domain loss with a penalty on changes
of weights that general text needs; a weight w at zero costs 1/2 w^2 F, and here F is the sum of both curvatures, each
the Fisher information on its text (`core.measured.sensitivity`), of which rows and columns are known. The paper's
first-order term is left out: it needs gradients of every weight. Error feedback is that of SparseGPT.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt

from outlierq.core.approximation import Approximation
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.pruning import Pattern, dropped, stored_bits, swept
from outlierq.ops.solve import inverse_cholesky
from outlierq.quantize.studies.bits import grid_bits
from outlierq.quantize.studies.sparsegpt import BLOCK, on_grid
from outlierq.registry import approximation

DAMP = 0.01  # of the mean diagonal, as in SparseGPT


@approximation("d_pruner", needs=("hessian",), paper="arXiv:2405.06275")
def d_pruner(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    importance: torch.Tensor | None = None,
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5,
    pattern: Pattern = "rows",
    survivors: Literal["stay", "move", "round"] = "move",
) -> Approximation:
    """Drop the weights with the least w^2 F; the others stay, or make up for them, and are rounded in the same sweep.

    w: [out, in] float32. importance: F, [out, in], of any source; None takes the power of the inputs, which is Wanda's.
    """
    power = stats.need("hessian").diagonal() if importance is None else importance
    gone = dropped(w.square() * power, sparsity, pattern)
    rounds = survivors == "round"
    bits = stored_bits(sparsity, pattern, scheme.bits if rounds else 16.0)
    bits += grid_bits(scheme, w.shape[1]) if rounds else 0.0
    if survivors == "stay":
        return Approximation(w.masked_fill(gone, 0.0), bits)
    upper, _ = inverse_cholesky(stats.need("hessian"), DAMP)
    grid = on_grid(w, scheme) if rounds else None
    return Approximation(swept(w, upper, lambda _, part: gone[:, part], BLOCK, grid), bits)


def dual_importance(fisher: list[tuple[torch.Tensor, torch.Tensor, int]]) -> torch.Tensor:
    """F of one linear, [out, in]: the sum over texts of what a weight's square costs there, in nats per token.

    fisher: of each text, the sums of squared gradients by output [out] and by input [in] (`LinearSensitivity`), and its
    tokens.
    """
    each = [
        torch.outer(outputs / outputs.mean().clamp(min=1e-300), inputs) / tokens for outputs, inputs, tokens in fisher
    ]
    return torch.stack(each).sum(0).float()
