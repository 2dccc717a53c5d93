"""GPTAQ: GPTQ with asymmetric calibration. Li et al. 2025, arXiv:2504.02692; in closed form as in Qronos.

The layer behind quantized blocks sees x, where the original saw x0. Asked for is the original output: with
D = mean (x0 - x) x^T and H = mean x x^T, |Q x - W x0|^2 has its minimum over unrounded Q at W (I + D H^-1), and is
tr((Q - that) H (Q - that)^T) away from it. So GPTQ rounds that weight instead (the order of steps is that of Qronos,
Zhang et al. 2025, arXiv:2505.11695). The paper adds the same correction term by term to the columns that are left.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt

from outlierq.core.notes import note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.errors import told_errors
from outlierq.ops.solve import factored
from outlierq.quantize.gptq import gptq, visiting_order
from outlierq.registry import quantizer


@quantizer("gptaq", needs=("hessian", "cross"), copies=6, factors=True, paper="arXiv:2504.02692")
def gptaq(
    w: torch.Tensor,
    stats: InputStats,
    scheme: QuantScheme,
    *,
    share: Annotated[float, Ge(0)] = 0.5,
    damp: Annotated[float, Gt(0)] = 0.01,
    order: Literal["none", "activation", "group-aware"] = "activation",
    refine_passes: Annotated[int, Ge(0)] = 2,
) -> QuantTensor:
    """Round, by GPTQ, the weight that gives the original output on the inputs behind quantized blocks.

    w: [out, in] float32. stats.cross: [in, in], see `InputStats`; inputs whose tokens are routed have none, and are
    rounded as by gptq. share: of the correction W D H^-1, whose D is known from few tokens; 0 is gptq. The other
    options are those of gptq.
    """
    target = corrected(w, stats, scheme, damp, order, share)
    rounded = partial(gptq, damp=damp, order=order, refine_passes=refine_passes)
    with told_errors():  # they are of the target
        return rounded(target, stats, scheme)


def corrected(
    w: torch.Tensor, stats: InputStats, scheme: QuantScheme, damp: float, order: str, share: float
) -> torch.Tensor:
    """W (I + share * D (H + damp)^-1), [out, in] float32; W where there are no pairs of inputs, which is noted.

    The factor of H is that of gptq, in its order.
    """
    hessian = stats.need("hessian")
    if stats.cross is None:
        note("its tokens are routed, so their original inputs are not known: rounded as by gptq")
        return w
    cross = stats.need("cross")
    if not share or not cross.any():
        return w
    factor = factored(hessian, damp, visiting_order(hessian, order, scheme))
    return w + share * factor.solve((w @ cross).T).T
