"""What every registered method promises, and the laws of GPTQ and AWQ that their papers state."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_origin

import pytest
import torch
from reference.gptq import best_by_brute_force, sweep_errors, textbook_codes
from reference.grids import grid_values
from reference.statistics import correlated_inputs, random_weight, row_errors, statistics_of

from outlierq.core.errors import NumbersError, StatsError
from outlierq.core.model import LinearSite
from outlierq.core.notes import collecting, note
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.core.stats import DERIVED, InputStats
from outlierq.ops import solve
from outlierq.quantize.stage import quantize_group
from outlierq.registry import Method, method, methods
from outlierq.transform.awq import Judge
from outlierq.transform.stage import choose_move, storable_scale

COLUMNS = 192  # more than one block of 128 columns, and not a multiple of it
ROWS = 24
SCHEMES = [
    QuantScheme(bits, size, symmetric) for bits in (2, 3, 4, 8) for size in (64, None) for symmetric in (True, False)
]


def variants(stage: str) -> Iterator[Any]:
    """Every method with its defaults, and with each value of each of its word options."""
    for found in methods(stage).values():
        yield pytest.param(found, {}, id=found.name)
        for name, option in found.options.items():
            words = get_args(option.annotation) if get_origin(option.annotation) is not None else ()
            for word in words:
                if isinstance(word, str) and word != option.default:
                    yield pytest.param(found, {name: word}, id=f"{found.name}, {name} {word}")


QUANTIZERS, TRANSFORMS = list(variants("quantize")), list(variants("transform"))
every_quantizer = pytest.mark.parametrize(("chosen", "options"), QUANTIZERS)
every_transform = pytest.mark.parametrize(("chosen", "options"), TRANSFORMS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


@pytest.fixture(scope="module")
def stats() -> InputStats:
    return statistics_of(correlated_inputs(512, COLUMNS), sequence_length=64)


@pytest.fixture
def w() -> torch.Tensor:
    return random_weight(ROWS, COLUMNS)


def error(w: torch.Tensor, result: QuantTensor, stats: InputStats) -> float:
    return row_errors(result.dequantize() - w, stats.hessian).sum().item()


def objective(options: dict[str, Any], stats: InputStats) -> InputStats:
    """What a variant minimises: the output error, or the weight error where it asks for that."""
    if options.get("scale_search") == "mse":
        return InputStats(tokens=1, sequences=1, hessian=torch.eye(COLUMNS))
    return stats


def plain_rounding(w: torch.Tensor, scheme: QuantScheme) -> QuantTensor:
    return method("quantize", "rtn").function(w, None, scheme)


def same(a: QuantTensor, b: QuantTensor) -> bool:
    zero_points = a.zero_point is b.zero_point or torch.equal(a.zero_point, b.zero_point)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zero_points


# Contracts: every quantizer, every scheme.


def test_the_lists_of_methods_are_not_empty():
    assert {"rtn", "gptq"} <= methods("quantize").keys()
    assert "awq" in methods("transform")
    assert len(QUANTIZERS) > len(methods("quantize"))


@every_scheme
@every_quantizer
def test_a_quantizer_keeps_to_the_grid_of_its_scheme(chosen, options, scheme, w, stats):
    result = chosen.function(w, stats, scheme, **options)
    groups = scheme.groups(COLUMNS)
    assert result.scheme == scheme
    assert result.codes.shape == w.shape
    assert not result.codes.is_floating_point()
    assert scheme.code_min <= result.codes.min() and result.codes.max() <= scheme.code_max
    assert result.scale.shape == (ROWS, groups)
    assert result.scale.dtype == getattr(torch, scheme.scale_dtype)
    assert torch.all(result.scale != 0)
    assert scheme.symmetric == (result.zero_point is None)
    if result.zero_point is not None:
        assert result.zero_point.shape == (ROWS, groups)
        assert result.zero_point.min() >= 0 and result.zero_point.max() <= scheme.code_max
    assert result.dequantize().isfinite().all()


@every_scheme
@every_quantizer
def test_a_quantizer_errs_no_more_than_min_max_rounding(chosen, options, scheme, w, stats):
    result, judged = chosen.function(w, stats, scheme, **options), objective(options, stats)
    assert error(w, result, judged) <= 1.01 * error(w, plain_rounding(w, scheme), judged)


@every_scheme
@every_quantizer
def test_a_quantizer_is_deterministic_and_does_not_write_to_its_inputs(chosen, options, scheme, w, stats):
    before = w.clone(), {name: value.clone() for name, value in stats.tensors().items()}
    first, second = (chosen.function(w, stats, scheme, **options) for _ in range(2))
    assert same(first, second)
    assert torch.equal(w, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in stats.tensors().items())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits in (2, 4)], ids=str)
@every_quantizer
def test_a_stack_of_linears_is_rounded_as_each_of_them_alone(chosen, options, scheme, w, stats):
    stack = chosen.function(w, stats, scheme, **options)
    parts = [chosen.function(part.clone(), stats, scheme, **options) for part in (w[:10], w[10:])]
    codes = torch.cat([part.codes for part in parts])
    # Products of other shapes may sum in another order, so a weight in the middle of two codes may go either way.
    assert (codes == stack.codes).float().mean() > 0.99
    assert sum(error(s, p, stats) for s, p in zip((w[:10], w[10:]), parts, strict=True)) == pytest.approx(
        error(w, stack, stats), rel=0.01
    )


@pytest.mark.parametrize("symmetric", [True, False])
@every_quantizer
def test_an_all_zero_row_stays_zero_and_a_dead_channel_does_no_harm(chosen, options, symmetric, w):
    x = correlated_inputs(256, COLUMNS)
    x[:, 7] = 0
    w[3] = 0
    stats, scheme = statistics_of(x), QuantScheme(4, 64, symmetric)
    result = chosen.function(w, stats, scheme, **options)
    judged = objective(options, stats)
    assert torch.all(result.dequantize()[3] == 0)
    assert error(w, result, judged) <= 1.01 * error(w, plain_rounding(w, scheme), judged)


@every_quantizer
def test_fewer_tokens_than_channels_are_enough_to_round(chosen, options, w):
    stats, scheme = statistics_of(correlated_inputs(32, COLUMNS)), QuantScheme(4, 64)
    result = chosen.function(w, stats, scheme, **options)
    judged = objective(options, stats)
    assert result.dequantize().isfinite().all()
    assert error(w, result, judged) <= 1.01 * error(w, plain_rounding(w, scheme), judged)


@pytest.mark.parametrize("shape", [(1, 64), (3, 8), (200, 32)])
@every_quantizer
def test_weights_of_any_shape_are_rounded(chosen, options, shape):
    w, scheme = random_weight(*shape), QuantScheme(4, 8)
    stats = statistics_of(correlated_inputs(128, shape[1], outliers=1))
    assert chosen.function(w, stats, scheme, **options).shape == shape


@pytest.mark.parametrize(
    "chosen", [*methods("quantize").values(), *methods("transform").values()], ids=lambda m: m.name
)
def test_a_method_names_its_source_and_documents_its_shapes(chosen: Method):
    assert "arXiv:" in chosen.paper or "doi" in chosen.paper
    assert chosen.summary.endswith((".", ";"))
    assert "[out, in]" in inspect.getdoc(chosen.function)
    assert inspect.getdoc(sys.modules[chosen.function.__module__])


@pytest.mark.parametrize(
    "chosen", [m for s in ("quantize", "transform") for m in methods(s).values() if m.needs], ids=lambda m: m.name
)
def test_a_method_says_which_statistics_it_misses(chosen: Method, w):
    with pytest.raises(StatsError, match="do not hold"):
        chosen.function(w, InputStats(tokens=1, sequences=1), QuantScheme(4, 64))


@every_quantizer
def test_a_quantizer_reads_only_the_statistics_it_declares(chosen, options, w, stats):
    fields = [field for name in chosen.needs_with(options) for field in DERIVED.get(name, (name,))]
    kept = {name: getattr(stats, name) for name in fields}
    scheme = QuantScheme(4, 64)
    little = chosen.function(w, InputStats(stats.tokens, stats.sequences, **kept), scheme, **options)
    assert same(little, chosen.function(w, stats, scheme, **options))


# GPTQ.


def gptq(w: torch.Tensor, stats: InputStats, scheme: QuantScheme, **options: Any) -> QuantTensor:
    return method("quantize", "gptq").function(w, stats, scheme, **options)


def plain_gptq(w: torch.Tensor, stats: InputStats, scheme: QuantScheme, **options: Any) -> QuantTensor:
    """GPTQ as in the paper: no search of scales, no refinement."""
    return gptq(w, stats, scheme, scale_search="minmax", refine_passes=0, **options)


def order_of(stats: InputStats, order: str, scheme: QuantScheme) -> list[int]:
    """The order of columns from its description."""
    importance, width = stats.hessian.diagonal().tolist(), scheme.columns_per_group(COLUMNS)
    by_importance = sorted(range(COLUMNS), key=lambda j: -importance[j])
    if order == "none":
        return list(range(COLUMNS))
    if order == "activation":
        return by_importance
    leaders = list(dict.fromkeys(j // width for j in by_importance))
    return [j for group in leaders for j in by_importance if j // width == group]


def spread(per_group: torch.Tensor | None, scheme: QuantScheme) -> torch.Tensor:
    """One value a weight, float64 [out, in]; zero for a missing zero point."""
    if per_group is None:
        return torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    return per_group.double().repeat_interleave(scheme.columns_per_group(COLUMNS), dim=1)


ORDERS = ("none", "activation", "group-aware")


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits in (2, 4)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_gptq_gives_the_codes_of_the_textbook_loop(order, scheme, w, stats):
    result = plain_gptq(w, stats, scheme, order=order)
    expected = textbook_codes(
        w,
        stats.hessian,
        spread(result.scale, scheme),
        spread(result.zero_point, scheme),
        (scheme.code_min, scheme.code_max),
        damp=0.01,
        order=order_of(stats, order, scheme),
    )
    # A weight that lies between two codes up to float32 rounding takes its row along; no more than one in 24 may.
    assert (expected == result.codes).all(1).sum() >= ROWS - 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_min_max_scales_of_gptq_are_those_of_plain_rounding(scheme, w, stats):
    result, plain = plain_gptq(w, stats, scheme), plain_rounding(w, scheme)
    assert torch.equal(result.scale, plain.scale)
    assert scheme.symmetric or torch.equal(result.zero_point, plain.zero_point)


@pytest.mark.parametrize("damp", [0.01, 0.3])
@pytest.mark.parametrize("order", ORDERS)
def test_squared_sweep_errors_sum_to_the_damped_output_error(order, damp, w, stats):
    scheme = QuantScheme(4, 64)
    result = plain_gptq(w, stats, scheme, order=order, damp=damp)
    change, columns = result.dequantize().double() - w.double(), order_of(stats, order, scheme)
    errors = sweep_errors(change, stats.hessian, damp, columns)
    mean = stats.hessian.double().diagonal().mean()
    expected = row_errors(change, stats.hessian).sum() + damp * mean * change.square().sum()
    assert errors.square().sum().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_every_compensated_weight_was_rounded_to_its_nearest_code(order, w, stats):
    scheme = QuantScheme(4, 64)
    result, columns = plain_gptq(w, stats, scheme, order=order), order_of(stats, order, scheme)
    change = result.dequantize().double() - w.double()
    full = stats.hessian.double() + 0.01 * stats.hessian.double().diagonal().mean() * torch.eye(COLUMNS)
    diagonal = torch.linalg.cholesky(torch.linalg.inv(full[columns][:, columns]), upper=True).diagonal()
    moved = sweep_errors(change, stats.hessian, 0.01, columns) * diagonal
    steps = (moved / spread(result.scale, scheme)[:, columns]).abs()
    inside = ((result.codes > scheme.code_min) & (result.codes < scheme.code_max))[:, columns]
    assert steps[inside].max() <= 0.5 + 1e-3
    assert steps[inside].max() > 0.45


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "diagonal", [torch.ones(COLUMNS), torch.linspace(0.1, 50, COLUMNS)], ids=["identity", "diagonal"]
)
def test_without_correlation_plain_gptq_is_plain_rounding(diagonal, scheme, w):
    stats = InputStats(tokens=1, sequences=1, hessian=torch.diag(diagonal))
    for order in ORDERS:
        assert same(plain_gptq(w, stats, scheme, order=order), plain_rounding(w, scheme))


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_columns_are_no_worse_than_rounding_and_no_better_than_brute_force(symmetric):
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] += 0.95 * x[:, 0]
    stats, w, scheme = statistics_of(x), random_weight(40, 2), QuantScheme(3, None, symmetric, "float32")
    result = plain_gptq(w, stats, scheme, order="none", damp=1e-6)
    found = row_errors(result.dequantize() - w, stats.hessian)
    rounded = row_errors(plain_rounding(w, scheme).dequantize() - w, stats.hessian)
    assert torch.all(found <= rounded * (1 + 1e-3) + 1e-12)
    for row in range(40):
        zero = 0 if symmetric else result.zero_point[row, 0].item()
        values = grid_values(result.scale[row, 0].item(), zero, (scheme.code_min, scheme.code_max))
        assert found[row] >= best_by_brute_force(w[row], stats.hessian, [values, values]) * (1 - 1e-3) - 1e-12


def test_the_width_of_a_block_does_not_change_the_codes(monkeypatch, w, stats):
    scheme = QuantScheme(4, 64)
    results = []
    for block in (1, 32, 128, COLUMNS):
        monkeypatch.setattr(solve, "BLOCK", block)
        results.append(plain_gptq(w, stats, scheme))
    for other in results[1:]:
        assert (other.codes == results[0].codes).all(1).sum() >= ROWS - 1


def test_an_order_needs_no_index_of_groups(w, stats):
    """Scales stay with their original columns, so the plain layout of groups decodes what was optimised."""
    scheme = QuantScheme(4, 64)
    rounded = error(w, plain_rounding(w, scheme), stats)
    for order in ORDERS:
        assert error(w, plain_gptq(w, stats, scheme, order=order), stats) < 0.3 * rounded


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_lowers_the_error_of_plain_rounding_many_times(bits, w, stats):
    scheme = QuantScheme(bits, 64)
    rounded = error(w, plain_rounding(w, scheme), stats)
    paper, ours = error(w, plain_gptq(w, stats, scheme), stats), error(w, gptq(w, stats, scheme), stats)
    assert paper < rounded / 5
    assert ours < paper / 2


def test_the_first_columns_of_the_activation_order_keep_the_least_error():
    """A column is rounded well when many columns are left to make up for it; loud channels should be among them."""
    stats, scheme, w = (
        statistics_of(correlated_inputs(512, COLUMNS, outliers=8)),
        QuantScheme(3, 64),
        random_weight(64, COLUMNS),
    )
    by_order = {order: error(w, plain_gptq(w, stats, scheme, order=order), stats) for order in ("none", "activation")}
    assert by_order["activation"] < by_order["none"]


def test_a_hopeless_hessian_ends_in_rounding_to_nearest_and_a_note(w):
    hopeless = InputStats(tokens=1, sequences=1, hessian=torch.zeros(COLUMNS, COLUMNS))
    with collecting() as notes:
        rounded = gptq(w, hopeless, QuantScheme(4, 64), scale_search="minmax")
    assert torch.equal(rounded.codes, method("quantize", "rtn").function(w, None, QuantScheme(4, 64)).codes)
    assert len(notes) == 1 and "rounded to nearest" in notes[0] and "not positive definite" in notes[0]


def test_more_damping_than_asked_for_is_written_down(w):
    basis = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.ones(COLUMNS)
    values[0] = -0.03
    stats = InputStats(tokens=1, sequences=1, hessian=(basis * values) @ basis.T)
    with collecting() as notes:
        gptq(w, stats, QuantScheme(4, 64))
    assert any("damp" in text for text in notes)


# AWQ, and what every transform promises.


def scaled_error(w: torch.Tensor, scale: torch.Tensor, stats: InputStats, scheme: QuantScheme, search: str) -> float:
    """Output error of rounding `w * scale` and dividing the scale out again."""
    rtn = method("quantize", "rtn").function
    dense = rtn(w * scale, stats.scaled(scale), scheme, scale_search=search).dequantize() / scale
    return row_errors(dense - w, stats.hessian).sum().item()


def with_one_loud_channel() -> InputStats:
    x = torch.randn(1024, 128, generator=torch.Generator().manual_seed(3))
    x[:, 37] *= 50
    return statistics_of(x)


@every_scheme
@every_transform
def test_a_chosen_scale_is_positive_finite_and_no_worse_than_none(chosen, options, scheme, w, stats):
    scale = chosen.function(w, stats, scheme, **options)
    assert scale.shape == (COLUMNS,)
    assert scale.isfinite().all() and torch.all(scale > 0)
    one = torch.ones(COLUMNS)
    # The transform judges by a grid of its own, so the rounding that follows may disagree by a little.
    assert scaled_error(w, scale, stats, scheme, "hessian") <= 1.05 * scaled_error(w, one, stats, scheme, "hessian")


@every_transform
def test_a_transform_is_deterministic_and_does_not_write_to_its_inputs(chosen, options, w, stats):
    before = w.clone(), {name: value.clone() for name, value in stats.tensors().items()}
    first, second = (chosen.function(w, stats, QuantScheme(3, 64), **options) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(w, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in stats.tensors().items())


@every_transform
def test_a_scale_divided_out_of_the_input_preserves_the_function(chosen, options, w, stats):
    scale = chosen.function(w, stats, QuantScheme(3, 64), **options).double()
    x = correlated_inputs(20, COLUMNS, seed=9).double()
    assert torch.allclose((x / scale) @ (w.double() * scale).T, x @ w.double().T, rtol=1e-9, atol=1e-9)


@every_transform
def test_channels_with_one_producer_get_one_scale(chosen, options, w, stats):
    tie = torch.arange(COLUMNS // 3).repeat_interleave(3).roll(5)
    scale = chosen.function(w, stats, QuantScheme(3, 64), tie, **options)
    assert scale.unique().numel() > 1
    for producer in range(COLUMNS // 3):
        assert scale[tie == producer].unique().numel() == 1


@every_transform
def test_a_tie_of_every_channel_to_itself_changes_nothing(chosen, options, w, stats):
    scheme = QuantScheme(3, 64)
    free, tied = (chosen.function(w, stats, scheme, tie, **options) for tie in (None, torch.arange(COLUMNS)))
    assert torch.allclose(free, tied, rtol=1e-5)


@every_transform
def test_dead_channels_keep_scale_one(chosen, options, w):
    x = correlated_inputs(256, COLUMNS)
    dead = [0, 50, 191]
    x[:, dead] = 0
    scale = chosen.function(w, statistics_of(x), QuantScheme(3, 64), **options)
    assert torch.all(scale[dead] == 1)
    assert not torch.all(scale == 1)


@every_transform
def test_an_input_that_is_always_zero_is_left_alone(chosen, options, w):
    scale = chosen.function(w, statistics_of(torch.zeros(4, COLUMNS)), QuantScheme(3, 64), **options)
    assert torch.all(scale == 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [128, None])
@every_transform
def test_a_loud_channel_gets_the_largest_scale_and_the_error_halves(chosen, options, group_size, symmetric):
    stats, scheme = with_one_loud_channel(), QuantScheme(3, group_size, symmetric)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    scale = chosen.function(w, stats, scheme, **options)
    assert scale.argmax() == 37
    assert scaled_error(w, scale, stats, scheme, "minmax") < 0.5 * scaled_error(
        w, torch.ones(128), stats, scheme, "minmax"
    )


@every_transform
def test_a_tall_stack_gets_a_scale_as_good_as_none_or_better(chosen, options, stats):
    w, scheme = random_weight(1500, COLUMNS), QuantScheme(3, 64)
    scale = chosen.function(w, stats, scheme, **options)
    one = torch.ones(COLUMNS)
    assert scaled_error(w, scale, stats, scheme, "hessian") <= 1.05 * scaled_error(w, one, stats, scheme, "hessian")


def test_a_scale_that_is_no_better_on_tokens_held_out_is_dropped():
    torch.manual_seed(0)
    x, w, scheme = correlated_inputs(2048, COLUMNS), random_weight(64, COLUMNS), QuantScheme(3, 64)
    awq, none = method("transform", "awq").function, torch.ones(COLUMNS)
    judged = method("transform", "awq_held_out").function
    scale = awq(w, statistics_of(x), scheme)
    assert not torch.equal(scale, none)
    judge, drawn = Judge(w, statistics_of(x).hessian, scheme), torch.randn(128, COLUMNS)
    lost = [judge.held_out_error(scale, row[None]) - judge.held_out_error(none, row[None]) for row in drawn]
    rows = drawn[torch.tensor(lost).argsort(descending=True)[:32]] / 8  # tokens that pay for the others
    unlike = replace(statistics_of(torch.cat([rows, x])), rows=rows.bfloat16())
    with collecting() as notes:
        assert torch.equal(judged(w, unlike, scheme), none)
    assert notes == ["no scaling: it errs less on tokens held out"]
    assert not torch.equal(judged(w, statistics_of(x), scheme), none)


def test_the_rows_that_judge_a_scale_are_spread_over_the_whole_stack():
    w = torch.randn(100, 128, generator=torch.Generator().manual_seed(4))
    w[:64] = 0
    scale = method("transform", "awq").function(w, with_one_loud_channel(), QuantScheme(3, 128), search_rows=64)
    assert scale.argmax() == 37 and scale[37] > 1


def test_scales_stay_within_a_hundred(w):
    x = correlated_inputs(256, COLUMNS)
    x[:, 5] *= 1e7
    scale = method("transform", "awq").function(w, statistics_of(x), QuantScheme(3, 64))
    assert scale.max() <= 100 and scale.min() >= 0.01


def doubling(log: list[tuple[torch.Tensor, InputStats]]) -> Method:
    """A transform that asks for the scale 2 and notes what it was given."""

    def function(w: torch.Tensor, stats: InputStats, scheme: QuantScheme, tie: torch.Tensor | None) -> torch.Tensor:
        log.append((w, stats))
        return torch.full((w.shape[1],), 2.0)

    return Method("doubling", "transform", function, frozenset(), "none")


def test_a_second_transform_sees_what_the_first_left(w, stats):
    log: list[tuple[torch.Tensor, InputStats]] = []
    steps = [(doubling(log), {})] * 2
    total = choose_move(w, stats, QuantScheme(4, 64), None, steps, "q_proj").scale
    assert torch.all(total == 4)
    assert torch.equal(log[1][0], 2 * w)
    assert torch.allclose(log[1][1].hessian, stats.hessian / 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_transform_that_chooses_an_impossible_scale_is_stopped(bad, w, stats):
    broken = Method("broken", "transform", lambda w, *_: torch.full((w.shape[1],), bad), frozenset(), "none")
    with pytest.raises(NumbersError, match="broken chose a scale that is not finite and positive") as raised:
        choose_move(w, stats, QuantScheme(4, 64), None, [(broken, {})], "layers.0.q_proj")
    assert raised.value.where == "transform broken on layers.0.q_proj"


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_storable_scale_makes_the_folded_gain_exact_in_its_storage_type(dtype, offset):
    generator = torch.Generator().manual_seed(0)
    gain = (torch.rand(400, generator=generator) * 4 - offset).to(dtype).float() + offset
    wanted = torch.rand(400, generator=generator) * 3 + 0.3
    scale = storable_scale(gain, wanted, dtype, offset)
    folded = gain / scale - offset
    assert torch.allclose(folded.to(dtype).float(), folded, rtol=0, atol=1e-6)
    # A gain near 0 is stored coarsely beside the offset; elsewhere the scale moves by the precision of 16 bits alone.
    assert torch.allclose(scale[gain > 0.5], wanted[gain > 0.5], rtol=0.05)
    assert not torch.equal(scale, wanted)


def test_a_gain_that_is_zero_or_would_vanish_keeps_scale_one():
    gain = torch.tensor([0.0, 1e-7, -2.0])
    scale = storable_scale(gain, torch.tensor([3.0, 50.0, 3.0]), torch.float16, 0.0)
    assert scale[:2].tolist() == [1, 1]
    assert scale[2] == pytest.approx(3, rel=1e-3)


# The stage: stacks, notes and damaged weights.


def site(name: str, rows: int) -> LinearSite:
    return LinearSite(name, f"{name}.weight", None, rows, COLUMNS, 0)


def spy(seen: list[int]) -> Method:
    """Plain rounding that notes how many rows it was given at once."""

    def function(w: torch.Tensor, stats: InputStats | None, scheme: QuantScheme) -> QuantTensor:
        seen.append(len(w))
        note(f"saw {len(w)} rows")
        return plain_rounding(w, scheme)

    return Method("spy", "quantize", function, frozenset(), "none")


def test_linears_with_one_scheme_are_solved_as_one_stack_and_split_again(stats):
    q, k, v, gate = site("q", 8), site("k", 4), site("v", 6), site("gate", 2)
    weights = {s: random_weight(s.out_features, COLUMNS, seed=i) for i, s in enumerate((q, k, v, gate))}
    four, eight = QuantScheme(4, 64), QuantScheme(8, 64)
    seen: list[int] = []
    done = quantize_group(weights, {q: four, k: eight, v: four}, stats, spy(seen), {})
    assert sorted(seen) == [4, 14]
    assert list(done) == [q, k, v]
    for s, scheme in ((q, four), (k, eight), (v, four)):
        result, row = done[s]
        assert same(result, plain_rounding(weights[s], scheme))
        assert (row.site, row.bits, row.method) == (s.module, scheme.bits, "spy")
        power = row_errors(weights[s], stats.hessian).sum().item()
        assert row.output_error == pytest.approx(error(weights[s], result, stats) / power, rel=1e-3)
        assert row.bits_per_weight == scheme.bits + 16 / 64
    assert "saw 14 rows" in done[q][1].note


def test_without_statistics_there_is_no_output_error_but_a_weight_error():
    q = site("q", 8)
    _, row = quantize_group(
        {q: random_weight(8, COLUMNS)}, {q: QuantScheme(4, 64)}, None, method("quantize", "rtn"), {}
    )[q]
    assert row.output_error is None
    assert 0.01 < row.weight_error < 0.3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_with_the_count_of_its_bad_values(bad):
    q, k = site("q_proj", 8), site("k_proj", 8)
    weights = {q: random_weight(8, COLUMNS), k: random_weight(8, COLUMNS)}
    weights[k][2, 3:5] = bad
    with pytest.raises(NumbersError, match=r"k_proj\.weight holds 2 NaN or Inf among 1536") as raised:
        quantize_group(weights, dict.fromkeys(weights, QuantScheme(4, 64)), None, method("quantize", "rtn"), {})
    assert raised.value.where == "quantize on q_proj, k_proj"
    assert raised.value.hint


def test_statistics_that_are_not_finite_are_refused(stats):
    q, hessian = site("q_proj", 8), stats.hessian.clone()
    hessian[3, 5] = hessian[5, 3] = float("nan")
    broken = replace(stats, hessian=hessian)
    with pytest.raises(NumbersError):
        options = {"scale_search": "hessian"}
        quantize_group(
            {q: random_weight(8, COLUMNS)}, {q: QuantScheme(4, 64)}, broken, method("quantize", "rtn"), options
        )
