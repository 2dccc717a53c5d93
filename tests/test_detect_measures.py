"""Each outlier measure against a known answer: a distribution whose figure is in the books, or a planted case."""

from __future__ import annotations

from math import lgamma, log, pi

import numpy as np
import pytest
import torch

from outlierq.core.errors import StatsError
from outlierq.core.measured.block_stats import BlockStats
from outlierq.core.stats import InputStats
from outlierq.detect.blocks import massive, sinks
from outlierq.detect.inputs import channel_ratio, iqr_rate, kurtosis, qsur, sigma_rate
from outlierq.detect.inputs.concentration import top_share
from outlierq.detect.inputs.llm_int8 import large_share, outlier_features
from outlierq.detect.inputs.token_range import token_range
from outlierq.detect.weights import farms, hill, owl
from outlierq.detect.weights.spectrum import stable_rank


def stats_of(x: torch.Tensor, sequences: int = 1) -> InputStats:
    """Statistics of tokens [T, K], computed here and not by the collector."""
    wide, large = x.double(), x.abs() >= 6
    by_sequence = large.double().view(sequences, -1, x.shape[1]).mean(1).sum(0)
    octaves = (2 * x.abs().amax(1).log2()).floor().long() + 32
    return InputStats(
        len(x), sequences, min=x.amin(0), max=x.amax(0),
        sum_x=wide.sum(0), sum_abs=wide.abs().sum(0), sum_sq=(wide**2).sum(0),
        sum_cube=(wide**3).sum(0), sum_fourth=(wide**4).sum(0),
        count_large=large.double().sum(0), sequence_large=by_sequence,
        hessian=(wide.T @ wide / len(x)).float(), rows=x[:512].bfloat16(),
        token_histogram=torch.bincount(octaves.clamp(0, 63), minlength=64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def gauss() -> torch.Tensor:
    """4096 tokens of 64 channels; mean and scale are not standard, so that centring shows."""
    return torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) * 0.7 + 0.3


def test_a_gauss_has_kurtosis_three_over_everything_and_in_every_channel(gauss):
    stats = stats_of(gauss)
    assert kurtosis.kurtosis(stats) == pytest.approx(3, abs=0.05)
    assert kurtosis.channel_kurtosis(stats).mean().item() == pytest.approx(3, abs=0.05)


def test_kurtosis_of_a_constant_channel_is_not_a_number_and_of_a_constant_input_an_error(gauss):
    x = gauss.clone()
    x[:, 5] = 2.0
    assert kurtosis.channel_kurtosis(stats_of(x)).isnan().nonzero().flatten().tolist() == [5]
    with pytest.raises(StatsError, match="constant"):
        kurtosis.kurtosis(stats_of(torch.ones(16, 4)))


def test_a_gauss_has_a_quarter_percent_beyond_three_sigma(gauss):
    assert sigma_rate.sigma_rate(stats_of(gauss), gauss) == pytest.approx(0.0027, abs=0.0003)
    assert sigma_rate.column_sigma_rate(gauss).mean().item() == pytest.approx(0.0027, abs=0.0003)


def test_the_largest_sigma_is_the_distance_of_a_planted_value():
    x = torch.zeros(10_000, 1)
    x[0::2], x[1::2] = 1.0, -1.0
    x[7] = 41.0
    deviation = x.double().std(correction=0).item()
    assert sigma_rate.largest_sigma(stats_of(x)) == pytest.approx((41 - x.mean().item()) / deviation, rel=1e-5)


def test_a_gauss_has_seven_per_mille_beyond_the_fences(gauss):
    assert iqr_rate.iqr_rate(gauss.flatten()).item() == pytest.approx(0.0070, abs=0.0005)
    reference = np.percentile(gauss[:, 3].numpy(), [25, 75])
    reach = 1.5 * (reference[1] - reference[0])
    outside = ((gauss[:, 3] < reference[0] - reach) | (gauss[:, 3] > reference[1] + reach)).float().mean()
    assert iqr_rate.iqr_rate(gauss)[3].item() == pytest.approx(outside.item(), abs=1e-6)


@pytest.mark.parametrize("tail", [0.02, 0.1])
def test_hill_finds_the_exponent_of_a_pareto_density(tail):
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert hill.hill_alpha(uniform ** (-1 / 1.5), tail=tail) == pytest.approx(2.49, abs=0.06)


def test_hill_refuses_a_tail_of_a_few_values_and_one_of_zeros():
    with pytest.raises(StatsError, match="too short"):
        hill.hill_alpha(torch.rand(100))
    assert hill.hill_alphas(torch.zeros(512, 1)).isnan().all()


def test_random_matrices_of_every_shape_have_the_same_windowed_exponent():
    generator = torch.Generator().manual_seed(2)
    shapes = [(576, 576), (1536, 576), (192, 576), (256, 1024)]
    found = [farms.spectrum_alpha(torch.randn(shape, generator=generator)) for shape in shapes]
    assert found == pytest.approx([2.12] * 4, abs=0.04)


def test_without_windows_the_exponent_would_depend_on_the_shape():
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(3))
    whole = hill.hill_alpha(torch.linalg.svdvals(w) ** 2, tail=0.5)
    assert whole > 3.2


def test_a_heavy_tail_lowers_the_windowed_exponent():
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q for _ in range(2))
    w = left * torch.arange(1, 257).float() ** -1.5 @ right
    assert farms.spectrum_alpha(w) < 1.8


def test_stable_rank_is_the_exact_one():
    w = torch.randn(90, 60, generator=torch.Generator().manual_seed(5))
    exact = (w.square().sum() / torch.linalg.svdvals(w)[0] ** 2).item()
    assert stable_rank(w) == pytest.approx(exact, rel=0.01)
    assert stable_rank(torch.outer(w[:, 0], w[0])) == pytest.approx(1, rel=1e-4)


def test_channel_ratio_and_concentration_of_a_planted_channel(gauss):
    x = gauss.clone()
    x[:, 9] *= 60
    stats = stats_of(x)
    peaks = x.abs().amax(0)
    assert channel_ratio.channel_ratio(stats) == pytest.approx((peaks[9] / peaks.median()).item())
    assert channel_ratio.standing_out(channel_ratio.channel_ratios(stats.abs_max)) == (9,)
    assert top_share(stats) == pytest.approx((x[:, 9].square().sum() / x.square().sum()).item(), rel=1e-5)
    assert top_share(stats_of(gauss)) < 0.02


def test_the_upper_end_of_a_wide_distribution_does_not_stand_out():
    spread = torch.logspace(-2, 2, 101)  # the largest is 100 times the median one, and only the last of many
    assert channel_ratio.standing_out(spread) == ()


def test_a_dead_majority_of_channels_gives_no_ratio():
    with pytest.raises(StatsError, match="no median"):
        channel_ratio.channel_ratio(stats_of(torch.tensor([[0.0, 0.0, 0.0, 1.0]]).repeat(8, 1)))


@pytest.mark.parametrize("factor", [20.0, 60.0])
@pytest.mark.parametrize("seed", range(5))
def test_exactly_the_planted_channels_stand_out_among_uneven_natural_ones(factor, seed):
    generator = torch.Generator().manual_seed(seed)
    natural = torch.randn(576, generator=generator).mul(0.25).exp()
    natural[247], natural[308] = 7.0, 5.0
    planted = torch.randperm(576, generator=generator)[:6].sort().values
    stress = torch.ones(576).index_fill(0, planted, factor)
    blocks = []
    for _ in range(8):
        noise = torch.randn(2, 576, generator=generator).mul(0.1).exp()
        blocks.append([channel_ratio.channel_ratios(natural * stress * wobble) for wobble in noise])
    assert channel_ratio.persistent_channels(blocks) == tuple(planted.tolist())


def test_a_channel_that_is_large_in_few_blocks_does_not_stand_out_in_the_model():
    blocks = [[torch.ones(64)] for _ in range(10)]
    blocks[3][0][5] = blocks[4][0][5] = 1000.0
    assert channel_ratio.persistent_channels(blocks) == ()


def test_emergence_needs_a_quarter_of_the_layers_and_six_percent_of_the_positions():
    inputs = []
    for layer in range(8):
        x = torch.full((200, 16), 0.5)
        if layer < 2:
            x[:14, 3] = 6.0  # 2 of 8 layers, 7 % of the positions: just enough
            x[:10, 4] = 50.0  # 5 % of the positions: too few
        if layer < 1:
            x[:, 5] = 50.0  # everywhere, but in one layer of eight
        inputs.append(stats_of(x, sequences=2))
    assert outlier_features(inputs) == {3: (pytest.approx(0.25), pytest.approx(0.07))}
    assert large_share(inputs[7]) == 0
    assert large_share(inputs[0]) == pytest.approx((14 + 10 + 200) / (200 * 16))


def test_token_range_is_the_large_tokens_over_the_median_one():
    x = torch.ones(1000, 4)
    x[:5] = 64.0
    assert token_range(stats_of(x)) == 64.0
    assert token_range(stats_of(torch.ones(1000, 4))) == 1.0


def top(*rows: tuple[float, ...]) -> torch.Tensor:
    """A table of extreme entries: sequence, position, token, channel, value, median of the token."""
    return torch.tensor(rows)


def test_a_massive_activation_is_above_a_hundred_and_a_thousand_medians():
    entries = top((0, 0, 1, 7, -900.0, 30.0), (1, 4, 13, 7, 250.0, 0.2), (0, 9, 5, 2, 99.0, 0.05))
    found = massive.massive_entries(3, BlockStats(residual_top=entries, residual_median=torch.tensor(0.2)))
    assert [(e.block, e.sequence, e.position, e.token, e.channel, e.value) for e in found] == [
        (3, 0, 0, 1, 7, -900.0), (3, 1, 4, 13, 7, 250.0),
    ]  # fmt: skip
    assert found[0].ratio == pytest.approx(4500)
    quiet = BlockStats(residual_top=entries, residual_median=torch.tensor(2.0))
    assert massive.massive_entries(3, quiet) == ()


def test_a_persistent_massive_channel_repeats_in_the_sequences_with_one_value():
    steady = [(float(s), 0.0, 1.0, 7.0, 800.0 + s, 1.0) for s in range(9)]
    other = (9.0, 0.0, 1.0, 2.0, 300.0, 1.0)
    assert massive.persistent_share(BlockStats(residual_first=top(*steady, other))) == pytest.approx(0.9)
    wild = [(float(s), 0.0, 1.0, 7.0, 100.0 * 2**s, 1.0) for s in range(6)]
    assert massive.persistent_share(BlockStats(residual_first=top(*wild))) == 0


def test_the_super_weight_is_the_one_under_the_tokens_largest_input():
    (entry,) = massive.massive_entries(
        0, BlockStats(residual_top=top((2, 5, 11, 3, 600.0, 0.1)), residual_median=torch.tensor(0.1))
    )
    weight = torch.zeros(8, 20)
    weight[3, 17] = -4.0
    inputs = top((0, 5, 11, 1, 900.0, 1.0), (2, 5, 11, 17, -150.0, 1.0))
    assert massive.super_weight(entry, weight, inputs) == (17, -4.0, 600.0)
    assert massive.super_weight(entry, weight, inputs[:1]) is None


def test_sink_and_no_op_heads_are_told_apart():
    mass = torch.tensor([[0.9, 0.0, 0.05, 0.05], [0.9, 0.0, 0.05, 0.05], [0.2, 0.0, 0.1, 0.7], [0.4, 0.0, 0.1, 0.5]])
    stats = BlockStats(attention_mass=mass, sink_value_norm=torch.tensor([0.1, 1.2]))
    assert sinks.sink_heads(stats) == 0.75
    assert sinks.no_op_heads(stats) == 0.5  # both heads of the first key-value head
    loud = BlockStats(attention_mass=mass, sink_value_norm=torch.tensor([1.0, 0.1]))
    assert sinks.no_op_heads(loud) == 0


def test_owl_is_the_share_of_weights_above_five_times_the_pooled_mean():
    generator = torch.Generator().manual_seed(6)
    linears = [(torch.randn(40, 30, generator=generator), torch.rand(30, generator=generator) * 3) for _ in range(3)]
    pool = torch.cat([(w.abs() * rms).flatten() for w, rms in linears])
    assert owl.outlier_ratio(linears) == pytest.approx(100 * (pool > 5 * pool.mean()).double().mean().item())
    spiked = torch.ones(10, 100)
    spiked[:, 0] = 1000.0
    assert owl.outlier_ratio([(spiked, torch.ones(100))]) == pytest.approx(1.0)


def test_qsur_of_an_isotropic_gauss_is_a_ball_in_a_cube():
    width = 24
    ball = (width / 2 * log(pi) - lgamma(width / 2 + 1)) / width - log(2)
    assert qsur.log_qsur(9.0 * torch.eye(width)) == pytest.approx(ball, abs=1e-5)
    assert qsur.rotation_gain(torch.eye(width)) == 0


def test_the_best_rotation_of_a_skewed_gauss_reaches_what_the_gain_promises():
    from outlierq.ops.hadamard import hadamard_transform

    width, generator = 32, torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    skewed = basis @ torch.diag(torch.logspace(-2, 2, width)) @ basis.T
    vectors = torch.linalg.eigh(skewed).eigenvectors
    turned = (
        hadamard_transform(torch.eye(width)).T @ vectors.T @ skewed @ vectors @ hadamard_transform(torch.eye(width))
    )
    assert turned.diagonal() == pytest.approx(skewed.trace().item() / width, rel=1e-3)
    gained = qsur.log_qsur(turned) - qsur.log_qsur(skewed)
    assert gained > 0.2
    assert gained == pytest.approx(qsur.rotation_gain(skewed), abs=1e-3)
    assert qsur.rotation_gain(turned) == pytest.approx(0, abs=1e-3)


def test_qsur_of_fewer_tokens_than_channels_is_refused():
    with pytest.raises(StatsError, match="singular"):
        qsur.log_qsur(qsur.covariance(stats_of(torch.randn(6, 16))))
