"""What each way to store a layer is predicted to cost, from statistics and weights: no forward pass.

Some rows of every linear are rounded by the recipe's own method to every scheme. The squared change of the output,
tr(D H D^T), is weighed by what an error there costs at the end of the model: where the statistics hold it, by the
curvature of the KL divergence in each output (nats); else relative to the power of the output, and by the linear's
share of the weights (no unit).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from outlierq.core.errors import StatsError
from outlierq.core.machine.heap import return_freed_memory
from outlierq.core.measured.sensitivity import Sensitivity
from outlierq.core.model import InputGroup, LinearSite, as_matrix
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
    from outlierq.registry import Method

ROWS = 48  # of a linear that are rounded; what they lose stands for the others, whose output has so much more power
# A scheme is rounded to by the recipe's method only where rounding to nearest, which is quick, loses at most so many
# times what the line between the best smaller and the best larger scheme says (in the logarithm).
PROMISING = 1.2
Losses = list[dict[Storage, float]]  # by layer; schemes that promise nothing are missing


@dataclass(frozen=True)
class Prediction:
    """What every layer costs. in_nats: the sum of a choice predicts the KL divergence per token."""

    losses: Losses
    in_nats: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values; schemes by their words, which tell those of one layer apart."""
        return {
            "in_nats": self.in_nats,
            "losses": [{str(storage): loss for storage, loss in one.items()} for one in self.losses],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], layers: Sequence[Layer]) -> Prediction:
        """What `to_dict` gave, for the same layers."""
        named = [{str(storage): storage for storage in layer.choices} for layer in layers]
        pairs = zip(named, values["losses"], strict=True)
        return cls([{names[text]: loss for text, loss in one.items()} for names, one in pairs], values["in_nats"])


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
    losses: list[dict[Storage, _Loss]] = [{None: _Loss(0.0, 0.0, 0.0)} for _ in layers]
    for block in plan.structure.blocks:
        listen(Event("predict", block.index, len(plan.structure.blocks), block.name))
        for site, scheme, loss in _block_losses(plan, source, layers, of, sensitivity, block.index):
            known = losses[of[site]]
            known[scheme] = known[scheme] + loss if scheme in known else loss
        return_freed_memory()
    listen(Event("predict", len(plan.structure.blocks), len(plan.structure.blocks)))
    rate = _rate(losses, sum(layer.weights for layer in layers))
    return Prediction([{s: loss.total(rate) for s, loss in known.items()} for known in losses], sensitivity is not None)


def _rate(losses: Sequence[Mapping[Storage, _Loss]], weights: int) -> float:
    """Nats that stand for a relative loss where only that is known: as in the mean of all that is known."""
    known = [loss for one in losses for loss in one.values()]
    relative, nats = sum(loss.beside for loss in known), sum(loss.nats for loss in known)
    return nats / relative if relative > 0 and nats > 0 else 1 / weights


@dataclass(frozen=True)
class _Loss:
    """Of linears in a scheme. relative: of those that no gradient reached, squared error of the output over its power,
    times weights. nats: of the others; beside: their relative loss.
    """

    relative: float
    nats: float
    beside: float

    def __add__(self, other: _Loss) -> _Loss:
        return _Loss(self.relative + other.relative, self.nats + other.nats, self.beside + other.beside)

    def total(self, rate: float) -> float:
        """Everything, with `rate` nats for a relative loss."""
        return self.nats + rate * self.relative


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
        choices = _promising(plan, group, [layers[of[site]] for site in sites], samples, inputs)
        for scheme, changes in _rounded(plan, samples, inputs, list(dict.fromkeys(s for c in choices for s in c))):
            for site, held in zip(sites, choices, strict=True):
                if scheme in held:
                    yield site, scheme, samples[site].loss(changes[site])


def _promising(
    plan: Plan,
    group: InputGroup,
    layers: Sequence[Layer],
    samples: Mapping[LinearSite, _Sample],
    stats: InputStats | None,
) -> list[list[QuantScheme]]:
    """For each of the linears the schemes that are worth rounding to, as rounding to nearest shows.

    A layer with linears of other inputs keeps all: what these need is not known here.
    """
    from outlierq.registry import method

    whole = [{*layer.sites} <= {*group.sites} for layer in layers]
    schemes = [[scheme for scheme in layer.choices if scheme is not None] for layer in layers]
    if method("quantize", rounding(plan.recipe).method).name == "rtn" or not any(whole):
        return schemes
    asked = list(dict.fromkeys(scheme for each in schemes for scheme in each))
    quick: dict[LinearSite, dict[QuantScheme, float]] = {site: {} for site in samples}
    for scheme, changes in _nearest(samples, asked):
        for site, change in changes.items():
            quick[site][scheme] = samples[site].loss(change).total(1.0)
    return [
        _near_the_hull(layer, each, quick) if alone else each
        for layer, each, alone in zip(layers, schemes, whole, strict=True)
    ]


def _near_the_hull(
    layer: Layer, schemes: Sequence[QuantScheme], quick: Mapping[LinearSite, Mapping[QuantScheme, float]]
) -> list[QuantScheme]:
    """The schemes whose quick loss is at most `PROMISING` times that of the line between their neighbours."""
    from outlierq.ops.search.knapsack import Choice, hull

    sizes = [layer.choices[scheme] for scheme in schemes]
    levels = [math.log(max(sum(quick[site][scheme] for site in layer.sites), 1e-30)) for scheme in schemes]
    corners = hull([Choice(size, level) for size, level in zip(sizes, levels, strict=True)])
    line = np.interp(sizes, [sizes[at] for at in corners], [levels[at] for at in corners])
    near = zip(schemes, levels, line, strict=True)
    return [scheme for scheme, level, lowest in near if level <= lowest + math.log(PROMISING)]


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
            return _Loss(relative, 0.0, 0.0)
        return _Loss(0.0, 0.5 * (errors * self.outputs).sum().item() * self._where_it_counts(change), relative)

    def _where_it_counts(self, change: torch.Tensor) -> float:
        """How much more the tokens count at which the changed columns are large, than all tokens do."""
        assert self.outputs is not None and self.inputs is not None, "the costs are known"
        columns = change.square().T @ (self.outputs * self.counts)  # [in]
        plain = (columns * self.hessian.diagonal()).sum().item()
        return (columns * self.inputs).sum().item() / plain if plain > 0 else 1.0


def _known(stats: InputStats | None) -> bool:
    """Whether a token reached the input, and its hessian was kept."""
    return stats is not None and stats.tokens > 0 and stats.hessian is not None


Changes = Iterator[tuple[QuantScheme, dict[LinearSite, "torch.Tensor"]]]


def _rounded(
    plan: Plan, samples: Mapping[LinearSite, _Sample], stats: InputStats | None, schemes: Sequence[QuantScheme]
) -> Changes:
    """By scheme, how the sampled rows of linears with one input change when the recipe's method rounds them."""
    from outlierq.registry import method

    section, calibration = rounding(plan.recipe), plan.recipe.calibration
    used, options = method("quantize", section.method), section.options
    if not _known(stats) and used.needs_with(options):
        return _changes(method("quantize", "rtn"), UNKNOWN_INPUT, samples, None, schemes)
    if stats is not None and calibration is not None:
        stats = stats.weighing_sinks(calibration.sink_weight)
    return _changes(used, options, samples, stats, schemes)


def _nearest(samples: Mapping[LinearSite, _Sample], schemes: Sequence[QuantScheme]) -> Changes:
    """The same, rounded to nearest with the scales that just hold each group."""
    from outlierq.registry import method

    return _changes(method("quantize", "rtn"), {}, samples, None, schemes)


def _changes(
    used: Method,
    options: Mapping[str, Any],
    samples: Mapping[LinearSite, _Sample],
    stats: InputStats | None,
    schemes: Sequence[QuantScheme],
) -> Changes:
    """The same by a method, on all rows at once."""
    import torch

    from outlierq.ops.solve import sharing_factors

    stack = torch.cat([sample.rows for sample in samples.values()]) if samples else torch.empty(0)
    sizes = [len(sample.rows) for sample in samples.values()]
    # Group-aware columns have another order for every group size, and then there is no factor to share.
    with sharing_factors() if options.get("order") != "group-aware" else nullcontext():
        for scheme in schemes:
            rounded: QuantTensor = used.function(stack.clone(), stats, scheme, **options)
            change = rounded.dequantize().sub_(stack)
            yield scheme, dict(zip(samples, change.split(sizes), strict=True))
