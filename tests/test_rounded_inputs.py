"""Statistics of inputs as the client rounds them, and weights that make up for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of
from test_calibrate_collect import CHANNELS, GROUPS, LENGTH, TwoLinears, inputs
from test_resume import SMALL, compress

from outlierq.calibrate.collect import Collector, Sequences
from outlierq.calibrate.rounding import rounding_inputs
from outlierq.core.errors import RecipeError
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.ops.activations import fake_quantize
from outlierq.quantize.gptaq import gptaq
from outlierq.quantize.gptq import gptq
from outlierq.recipe import load

MXFP4 = ActivationScheme("float", 4, True, "group", 32, "power-of-two")
SCHEME = QuantScheme(4, 32, kind="float", scales="power-of-two", activations=MXFP4)
ROUNDED = ["calibration.inputs=rounded"]


@pytest.mark.parametrize("skip", [0, 2])
def test_the_hessian_and_the_cross_moment_are_of_rounded_inputs_and_the_extremes_of_exact_ones(skip):
    module, batches = TwoLinears(), [inputs(3, 0), inputs(2, 1)]
    needs = {"hessian", "cross", "min", "max", "rows", "first_rows"}
    names = {group.name: MXFP4 for group in GROUPS}
    collector = Collector(module, GROUPS, needs, Sequences(LENGTH, skip), inputs=names)
    with torch.inference_mode(), collector:
        for batch in batches:
            module(batch)
    whole = torch.cat(batches)
    x = whole.double()[:, skip:].reshape(-1, CHANNELS)
    q = fake_quantize(whole, MXFP4).double()[:, skip:].reshape(-1, CHANNELS)
    for stats in collector.finish().values():
        assert torch.allclose(stats.hessian.double(), q.T @ q / len(q), rtol=1e-4, atol=1e-4)
        assert torch.allclose(stats.cross.double(), (x - q).T @ q / len(q), rtol=1e-4, atol=1e-4)
        assert torch.equal(stats.max.double(), x.amax(0)) and torch.equal(stats.min.double(), x.amin(0))
        if not skip:
            assert torch.equal(stats.first_rounded, fake_quantize(whole, MXFP4)[:, 0])
            assert torch.equal(stats.first_rows, whole[:, 0])


def test_sinks_are_weighed_by_their_rounded_tokens():
    x = correlated_inputs(64, CHANNELS)
    q = fake_quantize(x, MXFP4)
    first = {"first_rows": x[:1], "first_rounded": q[:1], "first_change": (x - q)[:1]}
    stats = InputStats(len(x), 1, hessian=q.T @ q / len(x), cross=(x - q).T @ q / len(x), **first)
    often = [*[0] * 3, *range(len(x))]
    weighed = stats.weighing_sinks(4)
    assert torch.allclose(weighed.hessian, q[often].T @ q[often] / len(often), rtol=1e-4, atol=1e-5)
    assert torch.allclose(weighed.cross, (x - q)[often].T @ q[often] / len(often), rtol=1e-4, atol=1e-5)


def test_weights_for_rounded_inputs_are_nearer_to_the_exact_outputs():
    x = correlated_inputs(2048, 128)
    q, w = fake_quantize(x, MXFP4), random_weight(24, 128)
    seen = replace(statistics_of(q), cross=(x - q).T @ q / len(q))

    def lost(stats: InputStats, by) -> float:
        return (q @ by(w, stats, SCHEME).dequantize().T - x @ w.T).square().sum().item()

    assert lost(seen, gptaq) < 0.97 * lost(statistics_of(x), gptq)


def test_a_block_rounds_inside_and_a_collector_sees_what_comes():
    module, x = TwoLinears(), inputs(2, 0)
    exact = module(x)
    names = {site.module: MXFP4 for group in GROUPS for site in group.sites}
    collector = Collector(module, GROUPS, {"min", "max"}, Sequences(LENGTH))
    with torch.inference_mode(), rounding_inputs(module, names):
        with collector:
            rounded = module(x)
        assert torch.equal(rounded, module(fake_quantize(x, MXFP4)))
    assert not torch.equal(rounded, exact) and torch.equal(module(x), exact)
    assert all(torch.equal(stats.max, x.flatten(0, 1).amax(0)) for stats in collector.finish().values())


@pytest.mark.parametrize("mode", ["static", "sequential"])
def test_a_run_gives_every_rounded_input_its_pairs_from_the_first_block_on(tiny_llama, tmp_path, monkeypatch, mode):
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(InputStats, "weigh_sinks", lambda self, weight: seen.append(self) or self)
        compress(tiny_llama, tmp_path / "out", "mxfp4-w4a4", [*SMALL, *ROUNDED, f"calibration.mode={mode}"])
    assert seen and all(stats.cross.any() for stats in seen)


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("gptq-w4", [], "nothing rounds inputs"),
        ("w8a8-static", [], "one scale of a whole input is fixed after calibration"),
        ("auto-w8a8", [], "cheapest_remedy changes what is rounded after it was calibrated"),
    ],
)
def test_inputs_that_are_not_rounded_as_they_come_are_refused(recipe, settings, words):
    with pytest.raises(RecipeError, match=f"calibration.inputs: .*{words}.*set `inputs: exact`"):
        load(recipe, [*ROUNDED, *settings])
