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

from outlierq.core.errors import StatsError
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.model import LinearSite, as_matrix
from outlierq.core.scheme import QuantScheme
from outlierq.core.sensitivity import Sensitivity
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


def predict(
    plan: Plan,
    source: StatsSource,
    layers: Sequence[Layer],
    sensitivity: Sensitivity | None = None,
    *,
    listen: Listener = silent,
) -> Prediction:
    """The loss of every layer in every scheme that it may have; 0 for one that is kept.

    source: of statistics, which have to hold the hessian.
    """
    of = {site: number for number, layer in enumerate(layers) for site in layer.sites}
    losses: Losses = [dict.fromkeys(layer.choices, 0.0) for layer in layers]
    unknown: Losses = [dict.fromkeys(layer.choices, 0.0) for layer in layers]
    both = _Sums()
    for block in plan.structure.blocks:
        listen(Event("predict", block.index, len(plan.structure.blocks), block.name))
        for site, scheme, loss in _block_losses(plan, source, layers, of, sensitivity, block.index):
            both.add(loss)
            (unknown if loss.nats is None else losses)[of[site]][scheme] += (
                loss.relative if loss.nats is None else loss.nats
            )
        return_freed_memory()
    listen(Event("predict", len(plan.structure.blocks), len(plan.structure.blocks)))
    total = sum(layer.weights for layer in layers)
    rate = both.nats / both.relative if both.relative > 0 else 1 / total
    summed = [{s: known[s] + rate * rest[s] for s in known} for known, rest in zip(losses, unknown, strict=True)]
    return Prediction(summed, in_nats=sensitivity is not None)


@dataclass(frozen=True)
class _Loss:
    """Of a linear in a scheme. relative: squared error of the output over its power, times weights. nats: see above;
    None where no gradient reached the linear.
    """

    relative: float
    nats: float | None


@dataclass
class _Sums:
    """Of all losses that are known in nats: the rate at which others are taken for them."""

    relative: float = 0.0
    nats: float = 0.0

    def add(self, loss: _Loss) -> None:
        """Count one, if it is known."""
        if loss.nats is not None:
            self.relative += loss.relative
            self.nats += loss.nats


def _block_losses(
    plan: Plan,
    source: StatsSource,
    layers: Sequence[Layer],
    of: Mapping[LinearSite, int],
    sensitivity: Sensitivity | None,
    index: int,
) -> Iterator[tuple[LinearSite, QuantScheme, _Loss]]:
    """The loss of every linear of a block in every scheme."""
    groups, stats = source.block(index)
    for group in groups:
        sites = [site for site in group.sites if site in of]
        stored = plan.checkpoint.read_many([site.weight for site in sites])
        inputs = stats.get(group.name)
        samples = {
            site: _Sample.of(as_matrix(site, stored[site.weight]), inputs, _costs(site, sensitivity)) for site in sites
        }
        schemes = dict.fromkeys(scheme for site in sites for scheme in layers[of[site]].choices if scheme is not None)
        for scheme, changes in _rounded(plan, samples, inputs, list(schemes)):
            for site, change in changes.items():
                if scheme in layers[of[site]].choices:
                    yield site, scheme, samples[site].loss(change)


@dataclass(frozen=True)
class _Costs:
    """Of a squared change of each output, in nats per token of text. inputs: [in], see `LinearSensitivity`, per token.

    outputs: [out].
    """

    outputs: torch.Tensor
    inputs: torch.Tensor


def _costs(site: LinearSite, sensitivity: Sensitivity | None) -> _Costs | None:
    """What the statistics hold of a linear, None when that is nothing; StatsError for other shapes."""
    found = None if sensitivity is None else sensitivity.linears.get(site.module)
    if found is None or sensitivity is None:
        return None
    if (len(found.outputs), len(found.inputs)) != (site.out_features, site.in_features):
        raise StatsError(f"the sensitivity of {site.module} has other widths than the linear", hint="calibrate again")
    return _Costs((found.outputs / sensitivity.tokens).float(), (found.inputs / sensitivity.tokens).float())


@dataclass(frozen=True)
class _Sample:
    """Some rows of one linear that are rounded, and how much each of them counts.

    rows: [n, in]. hessian: [in, in] of the input. counts: [n], for how many rows one stands. power: of all outputs.
    weights: of all rows.
    """

    rows: torch.Tensor
    hessian: torch.Tensor
    counts: torch.Tensor
    power: float
    weights: int
    outputs: torch.Tensor | None
    inputs: torch.Tensor | None

    @classmethod
    def of(cls, weight: torch.Tensor, stats: InputStats | None, costs: _Costs | None) -> _Sample:
        """Half of the rows are those whose output matters most, the others lie evenly among the rest.

        weight: [out, in].
        """
        import torch

        dense = weight.float()
        hessian = stats.need("hessian") if _known(stats) and stats else torch.eye(dense.shape[1])
        power = ((dense @ hessian) * dense).sum(1).clamp_(min=0)  # [out]
        matters = power if costs is None else power * costs.outputs
        order = matters.argsort(descending=True, stable=True)
        most, rest = order[: ROWS // 2], order[ROWS // 2 :].sort().values
        drawn = spread(rest, ROWS // 2)
        known = matters[drawn].sum()
        share = matters[rest].sum() / known if known > 0 else torch.zeros(())
        at = torch.cat([most, drawn])
        counts = torch.cat([torch.ones(len(most)), share.expand(len(drawn))])
        outputs, inputs = (None, None) if costs is None else (costs.outputs[at], costs.inputs / costs.outputs.mean())
        return cls(dense[at], hessian, counts, power.sum().item(), dense.numel(), outputs, inputs)

    def loss(self, change: torch.Tensor) -> _Loss:
        """Of a change of the rows, [n, in]."""
        errors = ((change @ self.hessian) * change).sum(1) * self.counts
        relative = errors.sum().item() / self.power * self.weights if self.power > 0 else 0.0
        if self.outputs is None:
            return _Loss(relative, None)
        return _Loss(relative, 0.5 * (errors * self.outputs).sum().item() * self._where_it_counts(change))

    def _where_it_counts(self, change: torch.Tensor) -> float:
        """How much more the tokens count at which the changed columns are large, than all tokens do."""
        assert self.outputs is not None and self.inputs is not None, "the costs are known"
        columns = change.square().T @ (self.outputs * self.counts)  # [in]
        plain = (columns * self.hessian.diagonal()).sum().item()
        return (columns * self.inputs).sum().item() / plain if plain > 0 else 1.0


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
