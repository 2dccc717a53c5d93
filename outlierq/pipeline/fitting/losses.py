"""What each way to store a layer is predicted to cost, from statistics and weights: no forward pass.

Some rows of every linear are rounded to every scheme. The squared change of the output, tr(D H D^T), is weighed by what
an error there costs at the end of the model: where the statistics hold it, by the curvature of the KL divergence in
each output (nats); else relative to the power of the output, and by the linear's share of the weights (no unit).
Methods that solve by a factor of the hessian are foretold (foretold.py); others round the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.machine.heap import return_freed_memory, return_memory_at_once
from outlierq.core.measured.sensitivity import Sensitivity
from outlierq.core.model import InputGroup, LinearSite, as_matrix
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.asked.events import Event, Listener, silent
from outlierq.pipeline.block.stats import StatsSource
from outlierq.pipeline.fitting.foretold import Foretelling, Losses, Solved, changes_by
from outlierq.pipeline.fitting.layers import Layer, Storage
from outlierq.pipeline.fitting.sampled import Costs, Loss, Sample
from outlierq.pipeline.fitting.storage import rounding
from outlierq.pipeline.fitting.tables import table_losses
from outlierq.pipeline.planning.memory import LARGE
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import UNKNOWN_INPUT

if TYPE_CHECKING:
    import torch

    from outlierq.core.stats import InputStats
    from outlierq.registry import Method

# Blocks in which the method itself is asked, and inputs of each of them.
ASKED_BLOCKS, ASKED_INPUTS = 4, 4
DAMP = 0.01  # of methods that do not say
Predicted = list[dict[Storage, float]]  # by layer


@dataclass(frozen=True)
class Prediction:
    """What every layer costs. in_nats: the sum of a choice predicts the KL divergence per token."""

    losses: Predicted
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
    return_memory_at_once(LARGE)  # a plan lowers that, and then every step here would ask the system for its pages
    of = {site: number for number, layer in enumerate(layers) for site in layer.sites}
    losses: list[dict[Storage, Loss]] = [{None: Loss(0.0, 0.0, 0.0)} for _ in layers]
    predictor, blocks = _Predictor(plan, layers, of, sensitivity, _foretelling(plan)), plan.structure.blocks
    for block in blocks:
        listen(Event("predict", block.index, len(blocks), block.name))
        for site, scheme, loss in predictor.block_losses(source, block.index):
            known = losses[of[site]]
            known[scheme] = known[scheme] + loss if scheme in known else loss
        return_freed_memory()
    listen(Event("predict", len(blocks), len(blocks)))
    rate = _rate(losses, sum(layer.weights for layer in layers))
    measured = predictor.foretelling.rate
    totals = [{scheme: measured * loss.total(rate) for scheme, loss in known.items()} for known in losses]
    for number, layer in enumerate(layers):
        if layer.is_table and sensitivity is not None:
            totals[number] = table_losses(plan, layer, sensitivity)
    return Prediction(totals, sensitivity is not None)


def _foretelling(plan: Plan) -> Foretelling:
    """Of the recipe's method."""
    from outlierq.registry import method

    section = rounding(plan.recipe)
    return Foretelling(method("quantize", section.method), section.options)


def _rate(losses: Sequence[Mapping[Storage, Loss]], weights: int) -> float:
    """Nats that stand for a relative loss where only that is known: as in the mean of all that is known."""
    known = [loss for one in losses for loss in one.values()]
    relative, nats = sum(loss.beside for loss in known), sum(loss.nats for loss in known)
    return nats / relative if relative > 0 and nats > 0 else 1 / weights


@dataclass(frozen=True)
class _Predictor:
    """The losses of linears. of: number of the layer of every linear."""

    plan: Plan
    layers: Sequence[Layer]
    of: Mapping[LinearSite, int]
    sensitivity: Sensitivity | None
    foretelling: Foretelling

    def block_losses(self, source: StatsSource, index: int) -> Iterator[tuple[LinearSite, QuantScheme, Loss]]:
        """The loss of every linear of a block in every scheme."""
        from outlierq.ops.solve import sharing_factors

        groups, stats = source.block(index)
        groups = [group for group in groups if any(site in self.of for site in group.sites)]
        asked = _evenly(len(groups), ASKED_INPUTS)
        asking = index in _evenly(len(self.plan.structure.blocks), ASKED_BLOCKS)
        for number, group in enumerate(groups):
            with sharing_factors():
                losses = self._group_losses(group, stats.get(group.name), asking and number in asked)
            for site, by_scheme in losses.items():
                for scheme, loss in by_scheme.items():
                    if scheme in self.layers[self.of[site]].choices:
                        yield site, scheme, loss

    def _group_losses(self, group: InputGroup, stats: InputStats | None, asked: bool) -> Losses:
        """Of the linears of one input in every scheme that one of them may have. asked: whether the method is."""
        used, options, hessian, stats = self._asking(group, stats)
        if stats is None or not used.factors:
            samples = self._samples(group, hessian, hessian.diagonal())
            return _rounded(used, options, samples, stats, self._schemes(samples))
        solved = Solved.of(stats.need("hessian"), options.get("damp", DAMP))
        samples = self._samples(group, hessian, solved.pivots)
        losses = self.foretelling.losses(samples, solved, self._schemes(samples))
        if asked:
            self.foretelling.measure(samples, stats, losses)
        return losses

    def _asking(
        self, group: InputGroup, stats: InputStats | None
    ) -> tuple[Method, Mapping[str, Any], torch.Tensor, InputStats | None]:
        """The method of an input with its options, the hessian [in, in] by which is judged, and what it solves by.

        No statistics for an input that no token reached.
        """
        import torch

        from outlierq.registry import method

        used, options = self.foretelling.method, self.foretelling.options
        if stats is None or not stats.tokens or stats.hessian is None:
            if used.needs_with(options):
                used, options = method("quantize", "rtn"), UNKNOWN_INPUT
            return used, options, torch.eye(group.sites[0].in_features), None
        calibration = self.plan.recipe.calibration
        weighed = stats if calibration is None else stats.weighing_sinks(calibration.sink_weight)
        return used, options, stats.need("hessian"), weighed

    def _samples(self, group: InputGroup, hessian: torch.Tensor, importance: torch.Tensor) -> dict[LinearSite, Sample]:
        """Rows of each linear of an input. hessian: [in, in]; importance: [in]."""
        sites = [site for site in group.sites if site in self.of]
        stored = self.plan.checkpoint.read_many([site.weight for site in sites])
        weights = ((site, as_matrix(site, stored.pop(site.weight))) for site in sites)
        return {site: Sample.of(w, hessian, importance, Costs.of(site, self.sensitivity)) for site, w in weights}

    def _schemes(self, sites: Iterable[LinearSite]) -> list[QuantScheme]:
        """All that one of some linears may have."""
        choices = (scheme for site in sites for scheme in self.layers[self.of[site]].choices)
        return list(dict.fromkeys(scheme for scheme in choices if scheme is not None))


def _evenly(count: int, most: int) -> set[int]:
    """At most so many of the numbers below `count`, evenly spread."""
    return {(2 * part + 1) * count // (2 * most) for part in range(most)} if count > most else set(range(count))


def _rounded(
    used: Method,
    options: Mapping[str, Any],
    samples: Mapping[LinearSite, Sample],
    stats: InputStats | None,
    schemes: Sequence[QuantScheme],
) -> Losses:
    """The losses of linears with one input, all sampled rows rounded to every scheme."""
    losses: Losses = {site: {} for site in samples}
    for scheme in schemes:
        for site, change in changes_by(used, options, samples, stats, scheme).items():
            losses[site][scheme] = samples[site].loss(change)
    return losses
