"""One contender on the linears of a block, and what its budgets are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.approximation import Approximation
from outlierq.core.model import Checkpoint, LinearSite, TensorSource, as_matrix
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.pipeline.detect import BlockData, from_folder
from outlierq.pipeline.studying.contenders import Contender
from outlierq.pipeline.studying.stacks import row_bounds, stacked, stacks
from outlierq.registry import Method, method, methods

if TYPE_CHECKING:
    import torch

SPARSITY = 0.5  # mean of budgets by block

Schemes = Mapping[LinearSite, QuantScheme]


def method_of(contender: Contender) -> Method:
    """The quantizer or approximation of a contender that is no recipe."""
    return method("quantize" if contender.method in methods("quantize") else "approximate", contender.method)


def approximated(
    asked: Method, block: BlockData, schemes: Schemes, source: TensorSource, options: Mapping[str, Any]
) -> Iterator[tuple[dict[LinearSite, Approximation], torch.Tensor, InputStats]]:
    """What a method makes of the members of every stack of a block; the stack [out, in], and its statistics."""
    for members, _, stats in stacks(block, schemes):
        stack = stacked(members, source)
        made = asked.function(stack, stats, schemes[members[0]], **options)
        if not isinstance(made, Approximation):
            made = Approximation(made.dequantize(), made.bits_per_weight)
        yield _split(members, made), stack, stats


def _split(members: Sequence[LinearSite], made: Approximation) -> dict[LinearSite, Approximation]:
    """The rows of every member of a stack."""
    return {site: made.rows(*bounds) for site, bounds in zip(members, row_bounds(members), strict=True)}


def options_by_block(
    contender: Contender, stats: Path, checkpoint: Checkpoint, schemes: Schemes, source: TensorSource
) -> dict[int, dict[str, Any]]:
    """The options of a contender for every block of the statistics: sparsities differ where it has budgets."""
    from outlierq.detect.weights.owl import outlier_ratio, sparsities

    ratios, sizes = {}, {}
    for block in from_folder(stats, checkpoint).blocks:
        linears = []
        for members, _, known in stacks(block, schemes) if contender.budget else ():
            rms = (known.need("sum_sq") / known.tokens).sqrt()
            linears += [(as_matrix(site, source.read(site.weight)), rms) for site in members]
        ratios[block.index] = outlier_ratio(linears) if linears else 0.0
        sizes[block.index] = sum(weight.numel() for weight, _ in linears)
    if not contender.budget:
        return {index: dict(contender.options) for index in ratios}
    shares = sparsities(list(ratios.values()), list(sizes.values()), SPARSITY)
    return {index: {**contender.options, "sparsity": share} for index, share in zip(ratios, shares, strict=True)}
