"""A rounded block learns as a whole: what its method is given, and what the report says of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from outlierq.calibrate.batches import Batch
from outlierq.calibrate.folds import tensor_parameters
from outlierq.core.model import Block, LinearSite, as_matrix, from_matrix
from outlierq.core.notes import collecting
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import SiteRow
from outlierq.core.rounded_block import RoundedBlock
from outlierq.core.stats import InputStats
from outlierq.ops.errors import RelativeErrors
from outlierq.recipe import Learn
from outlierq.registry import method

if TYPE_CHECKING:
    import torch

Results = Mapping[LinearSite, tuple[QuantTensor, SiteRow]]


def learned(
    block: Block,
    batches: Sequence[Batch],
    tensors: Mapping[str, torch.Tensor],
    results: Results,
    stats: Mapping[LinearSite, InputStats],
    learn: Learn,
    first_counts: float,
) -> tuple[dict[LinearSite, tuple[QuantTensor, SiteRow]], list[str]]:
    """The results of a block after learning, and notes on it.

    tensors: of the block as they are before rounding, in their stored shapes. stats: of the inputs of linears where
    something is known of them. first_counts: see `RoundedBlock`.
    """
    for name, parameter in tensor_parameters(batches[0].module, block).items():
        parameter.data = tensors[name].to(parameter.device, parameter.dtype)
    weights = {site: as_matrix(site, tensors[site.weight].float()) for site in results}

    def run(values: Mapping[LinearSite, torch.Tensor], number: int) -> torch.Tensor:
        return batches[number].run(block, {s.weight: from_matrix(s, w) for s, w in values.items()})

    start = {site: quantized for site, (quantized, _) in results.items()}
    rounded = RoundedBlock(weights, start, len(batches), run, lambda number: batches[number].asked(), first_counts)
    with collecting() as notes:
        after = method("learn", learn.method).function(rounded, **learn.options)
    made = {}
    for site, (before, row) in results.items():
        made[site] = (before, row)
        if after[site] is not before:
            judged = _judged(row, weights[site], after[site], stats.get(site))
            made[site] = (after[site], replace(judged, method=f"{row.method}+{learn.method}"))
    return made, [f"{block.name}: {text}" for text in notes]


def _judged(row: SiteRow, weight: torch.Tensor, quantized: QuantTensor, stats: InputStats | None) -> SiteRow:
    """The row of a linear whose codes have changed, with the errors that it has now. weight: [out, in] float32."""
    errors = RelativeErrors()
    errors.add(weight, quantized.dequantize(), None if stats is None else stats.hessian)
    return replace(row, output_error=errors.output, weight_error=errors.weight)
