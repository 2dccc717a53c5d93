"""Asymmetric calibration: the original model runs beside the quantized one, and GPTAQ asks for its outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of
from test_calibrate_collect import CHANNELS, GROUPS, LENGTH, TwoLinears, inputs
from test_resume import KILLED, SMALL, compress, in_child, result

from outlierq.calibrate.collect import Collector, Sequences
from outlierq.calibrate.runner import BlockRunner
from outlierq.core.errors import RecipeError, StatsError
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import InputStats
from outlierq.quantize.gptaq import gptaq
from outlierq.quantize.gptq import gptq
from outlierq.recipe import load

SCHEME = QuantScheme(3, 64)
WIDTH = 128


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor, InputStats]:
    """Original inputs [tokens, K], the same behind blocks that lost some of them, and the statistics of both."""
    x0 = correlated_inputs(1024, WIDTH)
    generator = torch.Generator().manual_seed(7)
    lost = torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    x = x0 @ lost + 0.1 * torch.randn(x0.shape, generator=generator)
    return x0, x, replace(statistics_of(x), cross=(x0 - x).T @ x / len(x))


def lost_output(result, w, x0, x) -> float:
    return (x @ result.dequantize().T - x0 @ w.T).square().sum().item()


def test_equal_inputs_and_no_share_of_the_correction_give_the_codes_of_gptq(pairs):
    _, x, stats = pairs
    w = random_weight(24, WIDTH)
    plain = gptq(w, stats, SCHEME)
    assert torch.equal(gptaq(w, stats, SCHEME, share=0.0).codes, plain.codes)
    assert torch.equal(gptaq(w, statistics_of(x), SCHEME, share=1.0).codes, plain.codes)
    assert not torch.equal(gptaq(w, stats, SCHEME).codes, plain.codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_gptaq_is_nearer_to_the_original_outputs_than_gptq(pairs, bits):
    x0, x, stats = pairs
    w, scheme = random_weight(24, WIDTH), QuantScheme(bits, 64)
    plain, some, all_of_it = (
        lost_output(made, w, x0, x)
        for made in (gptq(w, stats, scheme), gptaq(w, stats, scheme), gptaq(w, stats, scheme, share=1.0))
    )
    assert all_of_it < some < plain


@pytest.mark.parametrize("skip", [0, 2])
def test_the_cross_moment_is_that_of_its_definition_however_tokens_come(skip):
    module = TwoLinears()
    collector = Collector(module, GROUPS, {"hessian", "cross"}, Sequences(LENGTH, skip))
    x0 = [inputs(3, 0), inputs(2, 1)]
    x = [batch + 0.1 * inputs(len(batch), 5) for batch in x0]
    with torch.inference_mode(), collector:
        for original, batch in zip(x0, x, strict=True):
            with collector.of_original():
                module(original)
            module(batch)
    for stats in collector.finish().values():
        change, rows = (torch.cat(each).double()[:, skip:].reshape(-1, CHANNELS) for each in (x0, x))
        change = change - rows
        assert torch.allclose(stats.cross.double(), change.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
        assert stats.tokens == len(rows)
        assert skip or torch.allclose(stats.first_change, (torch.cat(x0) - torch.cat(x))[:, 0])


def test_moments_of_pairs_merge_scale_and_weigh_sinks_as_their_definition(pairs):
    x0, x, _ = pairs
    half = len(x) // 2

    def stats_of(x0, x) -> InputStats:
        first = {"first_rows": x[:1], "first_change": (x0 - x)[:1]}
        return InputStats(len(x), 1, hessian=x.T @ x / len(x), cross=(x0 - x).T @ x / len(x), **first)

    merged = stats_of(x0[:half], x[:half]).merge(stats_of(x0[half:], x[half:]))
    assert torch.allclose(merged.cross, stats_of(x0, x).cross, rtol=1e-3, atol=1e-3)
    scale = torch.linspace(0.5, 2, WIDTH)
    assert torch.allclose(merged.scaled(scale).cross, stats_of(x0 / scale, x / scale).cross, rtol=1e-3, atol=1e-3)
    rows = [*[0] * 3, *range(half), *[half] * 3, *range(half, len(x))]
    often = stats_of(x0[rows], x[rows])
    assert torch.allclose(merged.weighing_sinks(4).cross, often.cross, rtol=1e-3, atol=1e-3)
    with pytest.raises(StatsError, match="cannot be shifted"):
        merged.shifted(scale)


def test_a_run_compares_later_blocks_with_the_original_and_a_killed_one_goes_on(tiny_llama, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(InputStats, "weigh_sinks", lambda self, weight: seen.append(self) or self)
        compress(tiny_llama, tmp_path / "watched", "gptaq-w4", SMALL)
    groups = len(seen) // 2
    assert groups and all(stats.cross is not None for stats in seen)
    assert not seen[0].cross.any()  # nothing is quantized before the first block
    assert all(stats.cross.any() for stats in seen[groups:])
    compress(tiny_llama, whole, "gptaq-w4", SMALL)
    moment = "after the first block is in the journal"
    assert in_child(moment, compress, tiny_llama, out, "gptaq-w4", SMALL) == KILLED
    compress(tiny_llama, out, "gptaq-w4", SMALL)
    assert result(out) == result(whole)


def test_gptaq_is_refused_without_quantized_blocks_before_it():
    with pytest.raises(RecipeError, match=r"calibration.mode: gptaq compares .* set `mode: sequential`"):
        load("gptaq-w4", ["calibration.mode=static"])


def test_a_model_whose_blocks_hand_on_more_than_hidden_states_is_refused(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(BlockRunner, "hands_on_more", True)
    with pytest.raises(RecipeError, match="cannot run beside its quantized self") as caught:
        compress(tiny_llama, tmp_path / "out", "gptaq-w4", SMALL)
    assert "gptq" in caught.value.hint and not (tmp_path / "out").exists()
