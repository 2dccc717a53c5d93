"""What GPTQ loses is foretold without it: by rounding to nearest under the pivots of its factor."""

from __future__ import annotations

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of

from outlierq.core.model import LinearSite
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.fitting import sampled
from outlierq.pipeline.fitting.foretold import Foretelling, Solved, changes_by
from outlierq.pipeline.fitting.sampled import Costs, Sample
from outlierq.registry import method

WIDTH = 96
SCHEMES = [QuantScheme(bits, size, sym) for bits in (2, 3, 4, 6, 8) for size in (32, None) for sym in (True, False)]
SCHEMES += [QuantScheme(4, 32, kind="float", scales="power-of-two"), QuantScheme(8, None, kind="float")]


def site(name: str, rows: int) -> LinearSite:
    """A linear of that many rows."""
    return LinearSite(module=name, weight=f"{name}.weight", bias=None, out_features=rows, in_features=WIDTH, block=0)


@pytest.fixture(scope="module")
def stats():
    """Of inputs with a few large channels."""
    return statistics_of(correlated_inputs(512, WIDTH, outliers=2))


def costs(hessian: torch.Tensor, rows: int) -> Costs:
    """Outputs of which some count a hundred times as much as others, and tokens that count unlike at some inputs."""
    random = torch.Generator().manual_seed(1)
    outputs, unlike = torch.randn(rows, generator=random).mul_(2).exp_(), torch.rand(WIDTH, generator=random)
    return Costs(outputs, (0.5 + unlike) * hessian.diagonal() * outputs.mean())


def samples_of(stats, importance, *, with_costs: bool) -> dict[LinearSite, Sample]:
    """Of two linears with one input."""
    random = torch.Generator().manual_seed(2)
    weights = {site(name, rows): torch.randn(rows, WIDTH, generator=random) for name, rows in (("a", 80), ("b", 48))}
    of = {one: costs(stats.hessian, len(w)) if with_costs else None for one, w in weights.items()}
    return {one: Sample.of(w, stats.hessian, importance, of[one]) for one, w in weights.items()}


@pytest.mark.parametrize("with_costs", [True, False], ids=["nats", "relative"])
def test_the_loss_of_gptq_on_all_rows_is_foretold_for_every_scheme(stats, with_costs, monkeypatch):
    used = method("quantize", "gptq")
    monkeypatch.setattr(sampled, "ROWS", 1000)
    solved = Solved.of(stats.hessian, 0.01)
    samples = samples_of(stats, solved.pivots, with_costs=with_costs)
    found = Foretelling(used, {}).losses(samples, solved, SCHEMES)
    ratios = []
    for scheme in SCHEMES:
        for one, change in changes_by(used, {}, samples, stats, scheme).items():
            ratios.append(found[one][scheme].total(1.0) / samples[one].loss(change).total(1.0))
    logs = torch.tensor(ratios).log()
    assert len(ratios) == 2 * len(SCHEMES) and logs.std() < 0.25 and logs.median().abs() < 0.3, ratios


@pytest.mark.parametrize("with_costs", [True, False], ids=["nats", "relative"])
def test_some_rows_stand_for_all(stats, with_costs, monkeypatch):
    losses, powers = [], []
    for rows in (32, 1000):
        monkeypatch.setattr(sampled, "ROWS", rows)
        solved = Solved.of(stats.hessian, 0.01)
        samples = samples_of(stats, solved.pivots, with_costs=with_costs)
        found = Foretelling(method("quantize", "gptq"), {}).losses(samples, solved, [QuantScheme(4, 32)])
        losses.append([loss.total(1.0) for by_scheme in found.values() for loss in by_scheme.values()])
        powers.append([sample.power for sample in samples.values()])
    assert losses[0] == pytest.approx(losses[1], rel=0.4) and powers[0] == pytest.approx(powers[1], rel=0.4)


def test_a_method_that_loses_more_than_foretold_is_asked_and_says_so(stats):
    plain = Foretelling(method("quantize", "gptq"), {"refine_passes": 0, "scale_search": "minmax"})
    better = Foretelling(method("quantize", "gptq"), {})
    solved = Solved.of(stats.hessian, 0.01)
    samples = samples_of(stats, solved.pivots, with_costs=True)
    for foretelling in (plain, better):
        assert foretelling.rate == 1.0
        losses = foretelling.losses(samples, solved, [QuantScheme(3, 32), QuantScheme(4, 32)])
        foretelling.measure(samples, stats, losses)
        foretelling.measure(samples, stats, losses)
    assert len(plain.ratios) == 2 and plain.rate > 1.1 * better.rate


def test_without_a_factor_rounding_errors_are_what_changes(stats):
    solved = Solved.of(torch.full((WIDTH, WIDTH), -1.0).fill_diagonal_(1e-9), 0.01)
    errors = random_weight(3, WIDTH)
    assert solved.factor is None and solved.change(errors) is errors


def test_weights_that_are_codes_already_lose_nothing_there_and_something_below(stats):
    grid = torch.randint(-8, 8, (64, WIDTH), generator=torch.Generator().manual_seed(0)).float()
    grid[:, ::32] = -8  # so that every group of 32 has the scale 1/16
    solved = Solved.of(stats.hessian, 0.01)
    one = site("a", 64)
    samples = {one: Sample.of(grid / 16, stats.hessian, solved.pivots, None)}
    found = Foretelling(method("quantize", "gptq"), {}).losses(samples, solved, [QuantScheme(b, 32) for b in (2, 4, 8)])
    losses = {scheme.bits: loss.relative for scheme, loss in found[one].items()}
    assert losses[4] == 0 and losses[2] > 0
