"""Linears that a scheme costs most, found before the run: they get 8-bit floats, or keep 16 bits.

One calibration beside the result gives rows of every input and what an error of each output costs at the end of the
model. Both operands of each linear are rounded, and what its output loses is weighed by that (nats). The choice is the
exact solution of a knapsack: the most loss saved for the share of the weights that the recipe allows. Weights are
rounded to nearest here, so that a method which rounds them better loses less than predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.calibrate.stored.stats_file import remove_statistics
from outlierq.core.model import Checkpoint, LinearSite, as_matrix
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.ops.search.knapsack import Choice, knapsack
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.stats import StatsFromFile
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.fitting.layers import together
from outlierq.pipeline.fitting.storage import known_client
from outlierq.pipeline.fitting.written import kinds, pattern
from outlierq.pipeline.ledger.folder import refuse_existing
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.recipe import Calibration, Recipe
from outlierq.recipe.sections import Activations, Override

if TYPE_CHECKING:
    import torch

    from outlierq.core.measured.sensitivity import Sensitivity
    from outlierq.core.stats import InputStats

FIELDS = frozenset({"rows", "first_rows"})
FP8 = QuantScheme(8, None, kind="float", activations=ActivationScheme("float"))
IN_FP8 = {"kind": "float", "bits": 8, "group_size": "channel", "scales": "plain"}
# FP8 is enough where it loses at most this share of what the scheme of the recipe loses.
ENOUGH = 0.1
# Output rows of a linear that are judged; the others stand in for them.
ROWS = 512


@dataclass(frozen=True)
class Unit:
    """Linears that a client runs as one. weights: in all. loss, loss_in_fp8: predicted for all of them."""

    sites: tuple[LinearSite, ...]
    weights: int
    loss: float
    loss_in_fp8: float

    @property
    def is_enough_in_fp8(self) -> bool:
        """Whether 16 bits would save little more."""
        return self.loss_in_fp8 <= ENOUGH * self.loss

    @property
    def loss_when_kept(self) -> float:
        """What is left when it is kept, in FP8 or in 16 bits."""
        return self.loss_in_fp8 if self.is_enough_in_fp8 else 0.0


def with_sensitive_kept(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    given: Path | None = None,
    restart: bool = False,
    resources: Resources = USUAL,
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with overrides for the linears that `quantize.keep_share` keeps, and a sentence that says which share.

    given: statistics of an earlier calibration; else they are made beside `out`, where a stopped run continues.
    """
    quantize = recipe.quantize
    if quantize is None or quantize.keep_share is None:
        return recipe, ()
    plain = recipe.model_copy(update={"quantize": quantize.model_copy(update={"keep_share": None})})
    plan = make_plan(checkpoint, plain)
    folder = given
    if folder is None:
        folder = _folder(out)
        if not folder.exists():
            refuse_existing(out)
        if restart:
            resources.ranks.first(lambda: remove_sensitive_stats(out))
        settings = (recipe.calibration or Calibration()).model_copy(update={"mode": "static", "inputs": "exact"})
        calibrate(checkpoint, settings, folder, only=FIELDS, sensitivity=True, resources=resources)
    made, share = folder, quantize.keep_share
    return resources.ranks.first(lambda: _kept(plain, plan, made, share))


def _kept(recipe: Recipe, plan: Plan, folder: Path, share: float) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what statistics in a folder say; the lead alone knows that they are complete."""
    source = StatsFromFile(folder, plan.checkpoint, plan.structure, FIELDS)
    units = units_of(plan, source, source.reader.sensitivity())
    return _with_overrides(recipe, units, most_costly(units, share))


def remove_sensitive_stats(out: Path) -> None:
    """The run for `out` is done: what was made here for it is not needed any more."""
    with suppress(OSError):
        remove_statistics(_folder(out))


def units_of(plan: Plan, source: StatsFromFile, sensitivity: Sensitivity | None) -> list[Unit]:
    """The units that the plan rounds inside of blocks, with what they are predicted to lose."""
    losses: dict[LinearSite, tuple[float, float]] = {}
    for block in plan.structure.blocks:
        groups, stats = source.block(block.index)
        for group in groups:
            rounded = [site for site in group.sites if site in plan.schemes]
            losses |= dict(_losses(plan, rounded, stats.get(group.name), sensitivity))
    units = []
    for sites in together(plan, known_client("vllm")):
        both = [losses.get(site, (0.0, 0.0)) for site in sites]
        weights = sum(site.out_features * site.in_features for site in sites)
        units.append(Unit(sites, weights, sum(own for own, _ in both), sum(fp8 for _, fp8 in both)))
    return units


def _losses(
    plan: Plan, sites: Sequence[LinearSite], stats: InputStats | None, sensitivity: Sensitivity | None
) -> Iterator[tuple[LinearSite, tuple[float, float]]]:
    """What each linear of one input loses in its own scheme and in FP8; nothing is known without tokens."""
    from outlierq.ops.search.clip_search import weighed_rows

    if stats is None or not stats.tokens or not sites:
        return
    x, counts = weighed_rows(stats)
    stored = plan.checkpoint.read_many([site.weight for site in sites])
    for site in sites:
        weight = as_matrix(site, stored[site.weight]).float()
        yield site, lost(weight, x, counts / counts.sum(), _costs(site, sensitivity), plan.schemes[site])


def _costs(site: LinearSite, sensitivity: Sensitivity | None) -> torch.Tensor | None:
    """[out] nats of a squared change of each output at a token; None where they are not known."""
    known = None if sensitivity is None else sensitivity.linears.get(site.module)
    return None if known is None or sensitivity is None else (known.outputs / sensitivity.tokens / 2).float()


def lost(
    weight: torch.Tensor, x: torch.Tensor, shares: torch.Tensor, costs: torch.Tensor | None, scheme: QuantScheme
) -> tuple[float, float]:
    """What a linear loses with both operands rounded, in a scheme and in FP8.

    weight: [out, in] float32. x: [tokens, in], with their shares [tokens]. costs: [out]; without them the squared
    change counts relative to the power of the output, times the number of weights.
    """
    import torch

    from outlierq.detect.sample import spread

    rows = spread(torch.arange(len(weight)), ROWS)
    part = weight[rows]
    exact = x @ part.T
    if costs is None:
        power = (exact.square() * shares[:, None]).sum()
        costs = torch.full((len(part),), weight.numel() / max(power.item(), 1e-30))
    else:
        costs = costs[rows] * (costs.sum() / costs[rows].sum().clamp(min=1e-30))
    changes = (_rounded(part, x, each).sub_(exact).square_() for each in (scheme, FP8))
    own, fp8 = ((shares @ change @ costs).item() for change in changes)
    return own, fp8


def _rounded(weight: torch.Tensor, x: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """The output [tokens, out] with both operands rounded."""
    from outlierq.ops.activations import fake_quantize
    from outlierq.ops.grid import minmax_grid
    from outlierq.ops.search.site_error import rounded_by

    inputs = x if scheme.activations is None else fake_quantize(x, scheme.activations)
    return inputs @ rounded_by(minmax_grid(weight, scheme), weight).T


def most_costly(units: Sequence[Unit], share: float) -> list[int]:
    """The units to keep: those that save most loss, with at most this share of all weights."""
    choices = [[Choice(0, unit.loss), Choice(unit.weights, unit.loss_when_kept)] for unit in units]
    chosen = knapsack(choices, int(share * sum(unit.weights for unit in units)))
    return [number for number, at in enumerate(chosen or []) if at == 1 and units[number].loss > 0]


def _with_overrides(recipe: Recipe, units: Sequence[Unit], kept: Sequence[int]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the kept units in overrides, and what they are predicted to save in words."""
    assert recipe.quantize is not None, "the recipe rounds nothing"
    in_fp8 = [site for number in kept if units[number].is_enough_in_fp8 for site in units[number].sites]
    in_16_bits = [site for number in kept if not units[number].is_enough_in_fp8 for site in units[number].sites]
    fp8 = IN_FP8 | {"activations": Activations(kind="float")}
    overrides = [*_overrides(in_fp8, fp8), *_overrides(in_16_bits, {"keep": True})]
    weights = sum(units[number].weights for number in kept) / max(1, sum(unit.weights for unit in units))
    before = sum(unit.loss for unit in units)
    after = before - sum(units[number].loss - units[number].loss_when_kept for number in kept)
    held = f"{len(kept)} of {len(units)} layers, {weights:.1%} of these weights, get FP8 or keep 16 bits"
    said = f"quantize.keep_share: {held}: predicted loss {before:.3g} -> {after:.3g}"
    quantize = recipe.quantize.model_copy(update={"overrides": (*recipe.quantize.overrides, *overrides)})
    return recipe.model_copy(update={"quantize": quantize}), (said,)


def _overrides(sites: Sequence[LinearSite], keys: Mapping[str, Any]) -> list[Override]:
    """One override for each kind of linear."""
    return [Override(match=pattern(names), **keys) for names in kinds(sites).values()]


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.sensitive")
