"""What each way to store a layer is predicted to cost, from statistics and weights: no forward pass.

Some rows of every linear are rounded by the recipe's own method to every scheme. The squared change of the output,
tr(D H D^T), is weighed by what an error there costs at the end of the model: where the statistics hold it, by the
curvature of the KL divergence in each output (nats); else relative to the power of the output, and by the linear's
share of the weights (no unit).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.model import LinearSite, as_matrix
from outlierq.core.scheme import QuantScheme
from outlierq.detect.sample import spread
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.block.stats import StatsSource
from outlierq.pipeline.fitting.layers import Layer, Storage
from outlierq.pipeline.fitting.storage import rounding
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import UNKNOWN_INPUT

if TYPE_CHECKING:
    import torch

    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.stats import InputStats

ROWS = 128  # of a linear that are rounded; what they lose stands for the others, whose output has so much more power
Losses = list[dict[Storage, float]]  # by layer


@dataclass(frozen=True)
class Prediction:
    """What every layer costs. in_nats: the sum of a choice predicts the KL divergence per token."""

    losses: Losses
    in_nats: bool


def predict(plan: Plan, source: StatsSource, layers: Sequence[Layer], *, listen: Listener = silent) -> Prediction:
    """The loss of every layer in every scheme that it may have; 0 for one that is kept.

    source: of statistics, which have to hold the hessian.
    """
    of = {site: number for number, layer in enumerate(layers) for site in layer.sites}
    losses: Losses = [dict.fromkeys(layer.choices, 0.0) for layer in layers]
    blocks = plan.structure.blocks
    total = sum(layer.weights for layer in layers)
    for block in blocks:
        listen(Event("predict", block.index, len(blocks), block.name))
        for site, scheme, loss in _block_losses(plan, source, layers, of, block.index, total):
            losses[of[site]][scheme] += loss
        return_freed_memory()
    listen(Event("predict", len(blocks), len(blocks)))
    return Prediction(losses, in_nats=False)


def _block_losses(
    plan: Plan, source: StatsSource, layers: Sequence[Layer], of: Mapping[LinearSite, int], index: int, total: int
) -> Iterator[tuple[LinearSite, QuantScheme, float]]:
    """The loss of every linear of a block in every scheme."""
    groups, stats = source.block(index)
    for group in groups:
        sites = [site for site in group.sites if site in of]
        stored = plan.checkpoint.read_many([site.weight for site in sites])
        inputs = stats.get(group.name)
        samples = {site: _Sample.of(site, as_matrix(site, stored[site.weight]), inputs, total) for site in sites}
        schemes = dict.fromkeys(scheme for site in sites for scheme in layers[of[site]].choices if scheme is not None)
        for scheme, changes in _rounded(plan, samples, inputs, list(schemes)):
            for site, change in changes.items():
                if scheme in layers[of[site]].choices:
                    yield site, scheme, samples[site].loss(change)


@dataclass(frozen=True)
class _Sample:
    """Some rows of one linear that are rounded, and what a squared change of the output of each costs.

    rows: [n, in]. hessian: [in, in] of the input. costs: [n]; a row that stands for others costs what they would.
    """

    rows: torch.Tensor
    hessian: torch.Tensor
    costs: torch.Tensor

    @classmethod
    def of(cls, site: LinearSite, weight: torch.Tensor, stats: InputStats | None, total: int) -> _Sample:
        """Half of the rows are those whose output matters most, the others lie evenly among the rest.

        total: weights of all layers.
        """
        import torch

        dense = weight.float()
        hessian = stats.need("hessian") if _known(stats) and stats else torch.eye(dense.shape[1])
        power = ((dense @ hessian) * dense).sum(1).clamp_(min=0)  # [out]
        all_power = power.sum().item()
        cost = torch.full_like(power, dense.numel() / total / all_power if all_power > 0 else 0.0)
        order = (power * cost).argsort(descending=True, stable=True)
        most, rest = order[: ROWS // 2], order[ROWS // 2 :].sort().values
        drawn = spread(rest, ROWS // 2)
        known = (power * cost)[drawn].sum()
        share = (power * cost)[rest].sum() / known if known > 0 else torch.zeros(())
        at = torch.cat([most, drawn])
        return cls(dense[at], hessian, torch.cat([cost[most], cost[drawn] * share]))

    def loss(self, change: torch.Tensor) -> float:
        """Of a change of the rows, [n, in]."""
        return (((change @ self.hessian) * change).sum(1) * self.costs).sum().item()


def _known(stats: InputStats | None) -> bool:
    """Whether a token reached the input, and its hessian was kept."""
    return stats is not None and stats.tokens > 0 and stats.hessian is not None


def _rounded(
    plan: Plan, samples: Mapping[LinearSite, _Sample], stats: InputStats | None, schemes: Sequence[QuantScheme]
) -> Iterator[tuple[QuantScheme, dict[LinearSite, torch.Tensor]]]:
    """By scheme, how the sampled rows of linears with one input change when they are rounded together."""
    import torch

    from outlierq.ops.solve import sharing_factors
    from outlierq.registry import method

    section, calibration = rounding(plan.recipe), plan.recipe.calibration
    used, options = method("quantize", section.method), section.options
    if not _known(stats) and used.needs_with(options):
        used, options, stats = method("quantize", "rtn"), UNKNOWN_INPUT, None
    elif stats is not None and calibration is not None:
        stats = stats.weighing_sinks(calibration.sink_weight)
    stack = torch.cat([sample.rows for sample in samples.values()]) if samples else torch.empty(0)
    sizes = [len(sample.rows) for sample in samples.values()]
    # Group-aware columns have another order for every group size, and then there is no factor to share.
    with sharing_factors() if options.get("order") != "group-aware" else nullcontext():
        for scheme in schemes:
            rounded: QuantTensor = used.function(stack.clone(), stats, scheme, **options)
            change = rounded.dequantize().sub_(stack)
            yield scheme, dict(zip(samples, change.split(sizes), strict=True))
