"""One contender on the linears of a block, and what its budgets are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from outlierq.core.approximation import Approximation
from outlierq.core.errors import StatsError
from outlierq.core.model import Checkpoint, LinearSite, TensorSource, as_matrix
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.pipeline.detect import BlockData, from_folder
from outlierq.pipeline.studying.contenders import Contender
from outlierq.pipeline.studying.stacks import row_bounds, stacked, stacks
from outlierq.registry import Method, method, methods

if TYPE_CHECKING:
    import torch

    from outlierq.core.measured.sensitivity import Sensitivity

SPARSITY = 0.5  # mean of budgets by block

Schemes = Mapping[LinearSite, QuantScheme]
Importance = Callable[[Sequence[LinearSite]], "torch.Tensor | None"]


def importance_of(contender: Contender, folders: Sequence[Path]) -> Importance | None:
    """What weights cost at the end of the model, on the texts of these statistics together; [out, in] of a stack.

    None for a contender that does not ask; a stack with a linear that no text reached has none. StatsError for
    statistics without sensitivity.
    """
    if not contender.importance:
        return None
    import torch

    from outlierq.calibrate.stored.stats_file import StatsReader
    from outlierq.quantize.studies.d_pruner import dual_importance

    texts: list[Sensitivity] = []
    for folder in folders:
        known = StatsReader(folder).sensitivity()
        if known is None:
            raise StatsError(f"{folder} does not say what weights cost", hint="outlierq calibrate --sensitivity does")
        texts.append(known)

    def of(members: Sequence[LinearSite]) -> torch.Tensor | None:
        rows = []
        for site in members:
            held = [(text.linears[site.module], text.tokens) for text in texts if site.module in text.linears]
            if not held:
                return None
            rows.append(dual_importance([(one.outputs, one.inputs, tokens) for one, tokens in held]))
        return torch.cat(rows)

    return of


def method_of(contender: Contender) -> Method:
    """The quantizer or approximation of a contender that is no recipe."""
    return method("quantize" if contender.method in methods("quantize") else "approximate", contender.method)


def approximated(
    asked: Method,
    block: BlockData,
    schemes: Schemes,
    source: TensorSource,
    options: Mapping[str, Any],
    importance: Importance | None = None,
) -> Iterator[tuple[dict[LinearSite, Approximation], torch.Tensor, InputStats]]:
    """What a method makes of the members of every stack of a block; the stack [out, in], and its statistics.

    importance: of the members of a stack, for a method that asks for it.
    """
    for members, _, stats in stacks(block, schemes):
        stack = stacked(members, source)
        costs = {} if importance is None else {"importance": importance(members)}
        made = asked.function(stack, stats, schemes[members[0]], **options, **costs)
        if not isinstance(made, Approximation):
            made = Approximation(made.dequantize(), made.bits_per_weight)
        yield _split(members, made), stack, stats


def _split(members: Sequence[LinearSite], made: Approximation) -> dict[LinearSite, Approximation]:
    """The rows of every member of a stack."""
    return {site: made.rows(*bounds) for site, bounds in zip(members, row_bounds(members), strict=True)}


def options_by_block(
    contender: Contender, stats: Path, checkpoint: Checkpoint, schemes: Schemes, source: TensorSource
) -> dict[int, dict[str, Any]]:
    """The options of a contender for every block of the statistics: sparsities differ where it has budgets.

    `owl`: more is left where more weights stand out; `farms`: where spectra have heavier tails (AlphaPruning's map).
    """
    from outlierq.detect.weights.farms import spectrum_alpha
    from outlierq.detect.weights.owl import outlier_ratio, sparsities

    ratios, sizes = {}, {}
    for block in from_folder(stats, checkpoint).blocks:
        linears = []
        for members, _, known in stacks(block, schemes) if contender.budget else ():
            rms = (known.need("sum_sq") / known.tokens).sqrt()
            linears += [(as_matrix(site, source.read(site.weight)), rms) for site in members]
        if contender.budget == "farms":
            ratios[block.index] = -mean(spectrum_alpha(weight) for weight, _ in linears)
        else:
            ratios[block.index] = outlier_ratio(linears) if linears else 0.0
        sizes[block.index] = sum(weight.numel() for weight, _ in linears)
    if not contender.budget:
        return {index: dict(contender.options) for index in ratios}
    shares = sparsities(list(ratios.values()), list(sizes.values()), SPARSITY)
    return {index: {**contender.options, "sparsity": share} for index, share in zip(ratios, shares, strict=True)}
