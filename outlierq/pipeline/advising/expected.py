"""What a plan is expected to lose: predicted from statistics, else as measured on another model, else not known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outlierq.core.errors import StatsError
from outlierq.pipeline.advising.hardware import table
from outlierq.pipeline.asked.events import Listener, silent
from outlierq.pipeline.block.stats import StatsFromFile
from outlierq.pipeline.block.stats_framed import StatsForFrame
from outlierq.pipeline.fitting.layers import Layer, site_bytes
from outlierq.pipeline.fitting.losses import predict
from outlierq.pipeline.fitting.sensitive import FIELDS, units_of
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.remodel.rewrite import original_of


@dataclass(frozen=True)
class Expected:
    """A loss. kind: "predicted", "measured" or "unknown". value: None where it is not known. unit: "nats" (KL
    divergence per token) or "relative" (squared error of the linears' outputs over their power). words: all of it.
    """

    kind: str
    value: float | None
    unit: str
    words: str


def expected(plan: Plan, stats: Path | None = None, *, listen: Listener = silent) -> Expected:
    """Of a plan. stats: what `calibrate` wrote of this model; StatsError when they are of another one."""
    if stats is None:
        return _measured(plan.recipe.name)
    try:
        value, in_nats = _predicted(plan, stats, listen)
    except StatsError as error:
        if "does not hold" not in error.what:
            raise
        return Expected("unknown", None, "", f"not known: {error.what}")
    steps = [step.method for step in plan.recipe.transform]
    without = f", before {' and '.join(steps)}, which {'are' if len(steps) > 1 else 'is'} there to lower it"
    if in_nats:
        said = f"KL {value:.3g} nats per token, predicted from {stats}"
    else:
        said = f"{value:.2%} of the linears' outputs, predicted from {stats} (KL: calibrate --sensitivity)"
    return Expected("predicted", value, "nats" if in_nats else "relative", said + (without if steps else ""))


def _measured(recipe: str) -> Expected:
    """What was measured of a recipe on one small model."""
    known = table("recommended")["measured"]
    value = known["kl"].get(recipe)
    if value is None:
        return Expected("unknown", None, "", "not known: measure it, by --max-kl or `outlierq eval`")
    return Expected("measured", value, "nats", f"KL {value:.3g} nats per token, measured on {known['of']}")


def _predicted(plan: Plan, stats: Path, listen: Listener) -> tuple[float, bool]:
    """The predicted loss of all linears in blocks, and whether it is in nats."""
    inputs = any(scheme.activations for scheme in plan.schemes.values())
    needs = FIELDS if inputs else plan.recipe.needs | {"hessian"}
    source = _source(plan, stats, needs)
    sensitivity = source.reader.sensitivity()
    weights = sum(site.out_features * site.in_features for site in plan.schemes if site.block is not None)
    if inputs:
        loss = sum(unit.loss for unit in units_of(plan, source, sensitivity))
        return (loss, True) if sensitivity is not None else (loss / max(1, weights), False)
    layers = [
        Layer((site,), {scheme: site_bytes(plan, site, scheme), None: site_bytes(plan, site, None)})
        for site, scheme in plan.schemes.items()
        if site.block is not None
    ]
    made = predict(plan, source, layers, sensitivity, listen=listen)
    losses = zip(layers, made.losses, strict=True)
    return sum(known.get(plan.schemes[layer.sites[0]], 0.0) for layer, known in losses), made.in_nats


def _source(plan: Plan, stats: Path, needs: frozenset[str]) -> StatsFromFile:
    """The statistics of this plan's model."""
    if plan.checkpoint.studied() is not None:
        return StatsForFrame(stats, plan.checkpoint, plan.structure, needs)
    return StatsFromFile(stats, original_of(plan.checkpoint), plan.structure, needs)
