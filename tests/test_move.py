"""SmoothQuant, OS+ and the choice between them: their laws, their judge, and what a run makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of
from safetensors.torch import load_file

from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.move import Move
from outlierq.core.notes import collecting
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load import load_model, open_checkpoint
from outlierq.ops.search.site_error import SiteError
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load
from outlierq.registry import Method, method
from outlierq.transform.refined_scale import _Noise, refined_scale
from outlierq.transform.stage import choose_move, storable_shift

CHANNELS, LOUD = 96, (5, 40, 77)
W8A8 = QuantScheme(8, None, activations=ActivationScheme())
STATIC = QuantScheme(8, None, activations=ActivationScheme(dynamic=False, per="tensor"))
ONE = torch.ones(CHANNELS)


def transform(name: str, *arguments, **options) -> torch.Tensor | Move:
    return method("transform", name).function(*arguments, **options)


def rows_kept(x: torch.Tensor) -> InputStats:
    """Statistics of `x` whose reservoir holds every token, exactly."""
    return replace(unpaired(x), rows=x)


def loud_inputs(factor: float = 60.0, *, seed: int = 0) -> torch.Tensor:
    x = correlated_inputs(256, CHANNELS, seed=seed, outliers=0)
    x[:, list(LOUD)] *= factor
    return x


@pytest.fixture(scope="module")
def w() -> torch.Tensor:
    return random_weight(48, CHANNELS)


@pytest.fixture(scope="module")
def loud() -> InputStats:
    return rows_kept(loud_inputs())


@pytest.fixture(scope="module")
def calm() -> InputStats:
    return rows_kept(torch.rand(256, CHANNELS, generator=torch.Generator().manual_seed(2)) * 2 - 1)


def int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).round().clamp(-128, 127) * scale


def direct_error(w, x, scale, shift, input_scale=None) -> float:
    """The definition, in float64: per-channel int8 weights with bfloat16 scales, per-token or static int8 inputs."""
    w, x, scale, shift = w.double(), x.double(), scale.double(), shift.double()
    moved, scaled = (x - shift) / scale, w * scale
    by_row = (scaled.abs().amax(1, keepdim=True) / 127).bfloat16().double()
    by_token = moved.abs().amax(1, keepdim=True) / 127 if input_scale is None else input_scale
    error = int8(moved, by_token) @ int8(scaled, by_row).T - (x - shift) @ w.T
    return (error.square().sum() / (x @ w.T).square().sum()).item()


# The judge.


def unpaired(x: torch.Tensor) -> InputStats:
    """Statistics of a model that ran alone: those of pairs cannot be shifted."""
    return replace(statistics_of(x), cross=None, first_change=None)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_predicted_error_is_that_of_both_operands_quantized(seed, shifted, w):
    generator = torch.Generator().manual_seed(seed)
    x = loud_inputs(10.0, seed=seed)
    scale = torch.rand(CHANNELS, generator=generator) * 3 + 0.5
    shift = torch.randn(CHANNELS, generator=generator) if shifted else torch.zeros(CHANNELS)
    found = SiteError(w, rows_kept(x), W8A8)(scale, shift if shifted else None)
    assert found == pytest.approx(direct_error(w, x, scale, shift), rel=0.02)


def test_first_tokens_count_beside_the_reservoir(w):
    x = loud_inputs(5.0)
    first = torch.randn(8, CHANNELS, generator=torch.Generator().manual_seed(3)) * 30
    stats = replace(rows_kept(x), tokens=1008, sequences=8, first_rows=first)
    error, power = 0.0, 0.0
    for rows, weight in ((x, 1000 / 256), (first, 1.0)):
        share = (rows.double() @ w.double().T).square().sum().item() * weight
        error += direct_error(w, rows, ONE, torch.zeros(CHANNELS)) * share
        power += share
    assert SiteError(w, stats, W8A8)(ONE) == pytest.approx(error / power, rel=0.02)


def test_a_static_scale_clips_where_that_errs_less(w):
    x = correlated_inputs(256, CHANNELS, outliers=0)
    x[7, 3], w = 3000.0, w.clone()  # one huge value in a channel that hardly counts
    w[:, 3] *= 1e-3
    found = SiteError(w, rows_kept(x), STATIC)(ONE)
    full = direct_error(w, x, ONE, torch.zeros(CHANNELS), 3000 / 127)
    best = min(direct_error(w, x, ONE, torch.zeros(CHANNELS), 3000 / 127 * 2 ** (-i / 4)) for i in range(17))
    assert best * 0.98 <= found < 0.7 * full


def test_without_activations_the_hessian_judges(w):
    x = correlated_inputs(256, CHANNELS, outliers=1)
    stats, scheme = replace(unpaired(x), rows=None), QuantScheme(8, None)
    rounded = int8(w, (w.abs().amax(1, keepdim=True) / 127).bfloat16().float())
    expected = ((x @ (rounded - w).T).square().sum() / (x @ w.T).square().sum()).item()
    assert SiteError(w, stats, scheme)(ONE) == pytest.approx(expected, rel=0.02)


# Values.


def test_two_moves_after_one_another_are_one(w):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        Move(torch.rand(CHANNELS, generator=generator) + 0.5, torch.randn(CHANNELS, generator=generator))
        for _ in range(2)
    )
    x = torch.randn(10, CHANNELS, generator=generator)
    both = first.then(second)
    expected = ((x - first.shift) / first.scale - second.shift) / second.scale
    assert torch.allclose((x - both.shift) / both.scale, expected, rtol=1e-4, atol=1e-5)
    assert Move(first.scale).then(Move(second.scale)).shift is None


def test_shifted_statistics_are_those_of_the_shifted_input():
    x, shift = correlated_inputs(128, CHANNELS), torch.linspace(-3, 5, CHANNELS)
    found, expected = unpaired(x).shifted(shift), unpaired(x - shift)
    for name in ("min", "max", "sum_x", "hessian"):
        one, other = getattr(found, name).double(), getattr(expected, name).double()
        assert (one - other).abs().max() < 1e-5 * other.abs().max(), name
    assert found.sum_abs is None and found.count_large is None


def test_a_hessian_that_weighs_sinks_is_shifted_by_the_mean_it_weighs():
    x, shift = correlated_inputs(60, CHANNELS), torch.linspace(-3, 5, CHANNELS)
    first = x.view(6, 10, CHANNELS)[:, 0]
    stats = replace(unpaired(x), sequences=6, first_rows=first).weighing_sinks(5.0).shifted(shift)
    weighed = torch.cat([x - shift, *[first - shift] * 4]).double()
    expected = weighed.T @ weighed / len(weighed)
    assert (stats.hessian.double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_storable_shift_makes_the_new_bias_exact_in_its_storage_type():
    generator = torch.Generator().manual_seed(0)
    bias, shift = torch.randn(200, generator=generator), torch.randn(200, generator=generator) * 4
    scale = torch.rand(200, generator=generator) + 0.5
    exact = storable_shift(bias, shift, scale, torch.bfloat16)
    folded = (bias - exact) / scale
    assert torch.allclose(folded.bfloat16().float(), folded, rtol=1e-5, atol=1e-6)
    assert (exact - shift).abs().max() < 0.02 * shift.abs().max() and not torch.equal(exact, shift)


# SmoothQuant.


def test_alpha_one_evens_out_the_input_and_alpha_zero_the_weights(w, loud):
    inputs = loud.abs_max / transform("smoothquant", w, loud, W8A8, alpha=1.0)
    columns = (w * transform("smoothquant", w, loud, W8A8, alpha=0.0)).abs().amax(0)
    for even in (inputs, columns):
        assert even.max() / even.min() == pytest.approx(1.0, rel=1e-4)


def test_alpha_one_half_is_the_geometric_mean_of_equation_four(w, loud):
    scale = transform("smoothquant", w, loud, W8A8, alpha=0.5)
    expected = (loud.abs_max / w.abs().amax(0)).sqrt()
    assert (scale / expected).std() < 1e-4 * (scale / expected).mean()


@pytest.mark.parametrize("scheme", [W8A8, STATIC, replace(W8A8, bits=4, group_size=32)], ids=str)
def test_the_searched_alpha_errs_no_more_than_any_fixed_one(scheme, w, loud):
    error = SiteError(w, loud, scheme)
    searched = error(transform("smoothquant", w, loud, scheme))
    fixed = [error(transform("smoothquant", w, loud, scheme, alpha=step / 10)) for step in range(11)]
    assert searched <= min(fixed) and searched < 0.8 * error(ONE)
    assert max(fixed) > 1.5 * searched


def test_loud_channels_are_calmed_and_the_error_falls_by_ten(w, loud):
    with collecting() as notes:
        scale = transform("smoothquant", w, loud, W8A8)
    before, after = (direct_error(w, loud.rows, s, torch.zeros(CHANNELS)) for s in (ONE, scale))
    assert after < before / 10
    assert set(scale.topk(3).indices.tolist()) == set(LOUD)
    assert len(notes) == 1 and "alpha 0." in notes[0] and "predicted output error" in notes[0]


@pytest.mark.parametrize("name", ["smoothquant", "os_plus", "cheapest_remedy"])
def test_powers_of_two_or_no_gain_at_all_are_left_as_they_are(name, calm):
    signs = torch.where(random_weight(48, CHANNELS) > 0, 1.0, -1.0)  # even columns: every alpha is the identity
    rows = torch.where(calm.rows > 0, 1.0, -1.0)
    with collecting() as notes:
        scale = transform(name, signs, rows_kept(rows), W8A8)
    assert torch.equal(scale, ONE)
    assert "no " in notes[0]


@pytest.mark.parametrize("name", ["smoothquant", "os_plus"])
def test_powers_of_two_are_absorbed_by_sixteen_bit_weights_without_rounding(name, w, loud):
    scale = transform(name, w, loud, W8A8, power_of_two=True)
    assert torch.equal(scale.log2(), scale.log2().round()) and scale.unique().numel() > 1
    short = w.bfloat16().float()
    assert torch.equal((short * scale).bfloat16().float(), short * scale)


def noise(w, x, scale) -> torch.Tensor:
    """The objective of the refinement, written out: squared steps of both grids times what they multiply."""
    by_token = (x / scale).abs().amax(1).square() / 127**2
    by_row = (w * scale).abs().amax(1).square() / 127**2
    from_inputs = by_token.mean() * (scale.square() * w.square().sum(0)).sum()
    return from_inputs + by_row.sum() * (x.square().mean(0) / scale.square()).sum()


def test_the_slope_of_the_refinement_is_that_of_its_objective(w):
    x = loud_inputs()
    logs = torch.randn(CHANNELS, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    noise(w.double(), x.double(), logs.exp()).log().backward()
    found = _Noise(w.double(), x.double(), torch.ones(len(x)).double(), W8A8).slope(logs.detach())
    assert torch.allclose(found, logs.grad, rtol=1e-6, atol=1e-9)


def test_refinement_ends_at_the_same_error_from_any_start(w):
    x = loud_inputs()
    ends = []
    for start in (ONE, torch.rand(CHANNELS, generator=torch.Generator().manual_seed(2)) * 9 + 0.1):
        scale = refined_scale(start, w, x, torch.ones(len(x)), W8A8, None, steps=400)
        ends.append(noise(w, x, scale).item())
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


@pytest.mark.parametrize("scheme", [W8A8, STATIC], ids=str)
def test_refinement_errs_less_than_the_best_alpha(scheme, w):
    x = loud_inputs(10.0)  # loud in every token, and beside it channels that are loud in a few
    x[::40, 20:30] *= 30
    stats = rows_kept(x)
    error = SiteError(w, stats, scheme)
    plain, refined = (error(transform("smoothquant", w, stats, scheme, refine_steps=n)) for n in (0, 60))
    assert refined < 0.9 * plain


def test_refinement_keeps_ties(w, loud):
    tie = torch.arange(CHANNELS // 2).repeat(2)
    scale = transform("smoothquant", w, loud, W8A8, tie)
    assert torch.allclose(scale[: CHANNELS // 2], scale[CHANNELS // 2 :]) and scale.unique().numel() > 2


# OS+.


def test_channels_within_the_threshold_keep_scale_one_and_others_end_at_it(w, loud):
    scale = transform("os_plus", w, loud, W8A8)
    moved = loud.abs_max / scale
    inside = scale == 1
    assert 0 < int(inside.sum()) < CHANNELS and not inside[list(LOUD)].any()
    threshold = moved[~inside].max()
    assert torch.allclose(moved[~inside], threshold.expand(int((~inside).sum())), rtol=1e-5)
    assert (loud.abs_max[inside] <= threshold).all()
    assert direct_error(w, loud.rows, scale, torch.zeros(CHANNELS)) < 0.1 * direct_error(
        w, loud.rows, ONE, torch.zeros(CHANNELS)
    )


def off_centre() -> InputStats:
    x = correlated_inputs(256, CHANNELS, outliers=0)
    x[:, list(LOUD)] += torch.tensor([150.0, -220.0, 90.0])
    return rows_kept(x)


def test_a_shift_centres_every_channel_and_beats_scaling_alone(w):
    stats = off_centre()
    move = transform("os_plus", w, stats, W8A8, None, True)
    assert isinstance(move, Move)
    left = stats.shifted(move.shift)
    assert torch.allclose(left.max, -left.min, rtol=1e-4, atol=1e-4)
    alone = transform("os_plus", w, stats, W8A8, None, False)
    assert isinstance(alone, torch.Tensor)
    none = torch.zeros(CHANNELS)
    shifted, scaled, before = (
        direct_error(w, stats.rows, *move) for move in ((move.scale, move.shift), (alone, none), (ONE, none))
    )
    assert shifted < 0.5 * scaled < 0.5 * before
    assert torch.equal(transform("os_plus", w, stats, W8A8, None, True, shift="never"), alone)


def test_channels_with_one_producer_get_one_shift(w):
    tie = torch.arange(CHANNELS // 2).repeat(2)
    move = transform("os_plus", w, off_centre(), W8A8, tie, True)
    assert torch.equal(move.shift[: CHANNELS // 2], move.shift[CHANNELS // 2 :])
    assert torch.equal(move.scale[: CHANNELS // 2], move.scale[CHANNELS // 2 :])


# The cheapest remedy.


def test_the_least_change_that_helps_is_taken_and_the_reason_is_written_down(w, loud, calm):
    chosen = {}
    for name, stats in (("calm", calm), ("loud", loud), ("off centre", off_centre())):
        with collecting() as notes:
            chosen[name] = transform("cheapest_remedy", w, stats, W8A8, None, True), notes[0]
    move, reason = chosen["calm"]
    assert torch.equal(move, ONE) and reason.startswith("nothing done: predicted output error")
    assert "no remedy saves 10% (smoothquant " in reason
    move, reason = chosen["loud"]
    assert torch.equal(move, transform("smoothquant", w, loud, W8A8)) and reason.startswith("smoothquant: predicted")
    move, reason = chosen["off centre"]
    assert isinstance(move, Move) and reason.startswith("os_plus with shift: predicted output error")
    assert "none 0." in reason or "none 1" in reason or "e-" in reason


def test_a_remedy_must_save_the_stated_share(w, loud):
    assert torch.equal(transform("cheapest_remedy", w, loud, W8A8, min_gain=0.999), ONE)
    assert not torch.equal(transform("cheapest_remedy", w, loud, W8A8, min_gain=0.5), ONE)


def test_an_error_that_stays_large_is_pointed_out(w, loud):
    for alarm, expected in ((1e-9, True), (0.5, False)):
        with collecting() as notes:
            transform("cheapest_remedy", w, loud, W8A8, alarm=alarm)
        assert any("consider `keep: true`" in text for text in notes) == expected


# Bad input.

EVERY = pytest.mark.parametrize("name", ["smoothquant", "os_plus", "cheapest_remedy"])


def chosen_by(name: str, w: torch.Tensor, stats: InputStats) -> Move:
    return choose_move(w, stats, W8A8, None, [(method("transform", name), {})], "layers.3.q_proj")


@EVERY
def test_statistics_without_rows_name_the_group_and_what_to_do(name, w, loud):
    with pytest.raises(StatsError, match="`rows`") as raised:
        chosen_by(name, w, replace(loud, rows=None))
    assert raised.value.where == f"transform {name} on layers.3.q_proj"
    assert "calibrate again" in raised.value.hint


@EVERY
@pytest.mark.parametrize("field", ["rows", "min", "weight"])
def test_a_nan_is_an_error_that_names_the_group(name, field, w, loud):
    if field == "weight":
        w = w.clone()
        w[3, 4] = float("nan")
    else:
        damaged = getattr(loud, field).clone()
        damaged[..., 4] = float("nan")
        loud = replace(loud, **{field: damaged})
    with pytest.raises(NumbersError) as raised:
        chosen_by(name, w, loud)
    assert raised.value.where == f"transform {name} on layers.3.q_proj"


@EVERY
def test_dead_constant_and_unread_channels_do_no_harm(name, w):
    x = loud_inputs()
    x[:, 10], x[:, 11] = 0.0, 50.0
    w = w.clone()
    w[:, list(LOUD[:1])] = 0
    stats = rows_kept(x)
    found = transform(name, w, stats, W8A8)
    assert found.isfinite().all() and found[10] == 1
    assert direct_error(w, x, found, torch.zeros(CHANNELS)) < direct_error(w, x, ONE, torch.zeros(CHANNELS))
    move = transform("os_plus", w, stats, W8A8, None, True)
    if isinstance(move, Move):
        assert move.shift[10] == 0 and move.shift[11] == 50


def test_a_shift_that_nothing_can_absorb_is_stopped(w, loud):
    def function(w, stats, scheme, tie):
        return Move(ONE, ONE)

    with pytest.raises(NumbersError, match="broken chose a shift that is not finite, or that nothing can absorb"):
        choose_move(w, loud, W8A8, None, [(Method("broken", "transform", function, frozenset(), "none"), {})], "q")


def test_tied_channels_that_were_to_be_moved_differently_are_stopped(w, loud):
    def function(w, stats, scheme, tie):
        return torch.linspace(1, 2, CHANNELS)

    tie = torch.arange(CHANNELS) // 2
    with pytest.raises(NumbersError, match="channels that share a producer"):
        choose_move(w, loud, W8A8, tie, [(Method("broken", "transform", function, frozenset(), "none"), {})], "q")


# Runs.


def compress(source, out, recipe: str, *settings: str, **options):
    small = ["calibration.samples=6", "calibration.sequence_length=32"]
    return quantize(make_plan(open_checkpoint(str(source)), load(recipe, [*small, *settings])), out, **options)


def logits(folder) -> torch.Tensor:
    ids = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return load_model(open_checkpoint(str(folder)))(ids).logits


@pytest.fixture(scope="module")
def original_logits(untied_llama) -> torch.Tensor:
    return logits(untied_llama)


@pytest.mark.parametrize("recipe", ["smoothquant-w8a8", "os-plus-w8a8", "auto-w8a8"])
def test_each_recipe_gives_a_model_that_computes_nearly_the_same_and_reports_its_choices(
    recipe, untied_llama, original_logits, tmp_path
):
    report = compress(untied_llama, tmp_path / "out", recipe)
    assert torch.linalg.norm(logits(tmp_path / "out") - original_logits) < 0.05 * torch.linalg.norm(original_logits)
    assert len(report.transforms) == 3 * 4
    assert all("predicted output error" in row["choice"] for row in report.transforms)
    told = [row["note"] for row in report.transforms if row["group"].endswith("o_proj")]
    assert all("v_proj.bias absorbs a shift" in note for note in told) == (recipe != "smoothquant-w8a8")


def test_a_linear_that_stays_in_16_bits_is_moved_with_its_group(untied_llama, original_logits, tmp_path):
    overrides = "quantize.overrides=[{match: '*q_proj', keep: true}, {match: '*down_proj', keep: true}]"
    compress(untied_llama, tmp_path / "out", "smoothquant-w8a8", overrides)
    assert torch.linalg.norm(logits(tmp_path / "out") - original_logits) < 0.05 * torch.linalg.norm(original_logits)
    kept = "model.layers.0.self_attn.q_proj.weight"
    before, after = (open_checkpoint(str(folder)).read(kept) for folder in (untied_llama, tmp_path / "out"))
    ratio = after / before
    assert not torch.allclose(after, before, rtol=1e-3)
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)


def test_statistics_from_a_file_give_the_same_moves(tiny_llama, tmp_path):
    settings = load("smoothquant-w8a8", ["calibration.samples=6", "calibration.sequence_length=32"]).calibration
    calibrate(open_checkpoint(str(tiny_llama)), settings, tmp_path / "stats")
    by_file = compress(tiny_llama, tmp_path / "a", "auto-w8a8", stats=tmp_path / "stats")
    by_run = compress(tiny_llama, tmp_path / "b", "auto-w8a8")
    assert by_file.transforms == by_run.transforms
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
