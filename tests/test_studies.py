"""Methods of the literature that no format holds: their laws, and that `outlierq study methods` compares them."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight, statistics_of
from safetensors.torch import load_file

import outlierq
from outlierq.core.approximation import Approximation
from outlierq.core.errors import OutlierqError
from outlierq.core.model import LinearSite
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.detect.blocks.ways_out import sentence, way_out
from outlierq.detect.weights.owl import sparsities
from outlierq.load import attention_names
from outlierq.ops.by_output import dimension_ratio, nearest, nearest_by_output
from outlierq.ops.errors import output_error
from outlierq.ops.low_rank import low_rank
from outlierq.ops.one_dimension import k_means
from outlierq.pipeline.studying.contenders import contenders
from outlierq.pipeline.studying.methods import Conditions
from outlierq.pipeline.studying.replaced import replace
from outlierq.pipeline.studying.texts import nonsense
from outlierq.quantize.studies import fixed_noise, tangent
from outlierq.quantize.studies.adadim import adadim
from outlierq.quantize.studies.d_pruner import d_pruner, dual_importance
from outlierq.quantize.studies.low_rank import with_branch
from outlierq.quantize.studies.sparsegpt import sparsegpt
from outlierq.quantize.studies.splitquant import splitquant
from outlierq.quantize.studies.wanda import wanda
from outlierq.recipe import load
from outlierq.registry import methods

WIDTH, ROWS = 192, 24
DATA = Path(outlierq.__file__).parent / "data"
SCHEME = QuantScheme(4, 64, symmetric=False)
METHODS = list(methods("approximate").values())
every_method = pytest.mark.parametrize("chosen", METHODS, ids=lambda method: method.name)


@pytest.fixture(scope="module")
def stats() -> InputStats:
    return statistics_of(correlated_inputs(512, WIDTH), sequence_length=64)


@pytest.fixture
def w() -> torch.Tensor:
    return random_weight(ROWS, WIDTH)


def lost(w: torch.Tensor, made: Approximation, stats: InputStats) -> float:
    return output_error(made.whole - w, stats.hessian).item()


def sqnr_db(w: torch.Tensor, values: torch.Tensor) -> float:
    return 10 * torch.log10(w.square().sum() / (values - w).square().sum()).item()


# All of them.


@every_method
def test_an_approximation_is_deterministic_and_leaves_its_inputs_alone(chosen, w, stats):
    before = w.clone()
    one, other = (chosen.function(w, stats, SCHEME) for _ in range(2))
    assert torch.equal(one.whole, other.whole) and torch.equal(w, before)
    assert one.weight.shape == w.shape and one.weight.dtype == torch.float32 and one.whole.isfinite().all()
    assert 2 < one.bits < 32


@every_method
def test_an_approximation_reads_only_the_statistics_it_declares(chosen, w, stats):
    little = InputStats(stats.tokens, stats.sequences, **{name: getattr(stats, name) for name in chosen.needs})
    assert torch.equal(chosen.function(w, little, SCHEME).whole, chosen.function(w, stats, SCHEME).whole)


@every_method
def test_an_approximation_names_its_source_and_documents_its_shapes(chosen):
    assert "arXiv:" in chosen.paper and "[out, in]" in inspect.getdoc(chosen.function)
    assert "arXiv:" in inspect.getdoc(sys.modules[chosen.function.__module__])


@every_method
def test_zeros_and_constant_weights_are_kept(chosen, stats):
    made = chosen.function(torch.zeros(ROWS, WIDTH), stats, SCHEME)
    assert not made.whole.any()


# AdaDim.


def test_groups_along_outputs_are_groups_along_inputs_of_the_transposed_weight(w):
    square = w[:, :ROWS]
    assert torch.equal(nearest_by_output(square, QuantScheme(3, 8)), nearest(square.T, QuantScheme(3, 8)).T)


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_adadim_takes_the_dimension_that_errs_less(rounding):
    w = random_weight(128, WIDTH)
    x = correlated_inputs(512, WIDTH, outliers=0)
    even = statistics_of(x.clone())
    x[:, 5] *= 100
    spoiled = w.clone()
    spoiled[::3] *= 3
    scheme = QuantScheme(3, 64, symmetric=False)
    assert dimension_ratio(w, statistics_of(x).hessian, scheme) < 0.8
    assert dimension_ratio(spoiled, even.hessian, scheme) > 1.3
    for weight, data in ((w, statistics_of(x)), (spoiled, even)):
        made = adadim(weight, data, scheme, rounding=rounding)
        both = [nearest(weight, scheme), nearest_by_output(weight, scheme)]
        least = min(output_error(values - weight, data.hessian).item() for values in both)
        assert lost(weight, made, data) <= least * 1.0001


def test_detect_says_in_which_dimension_groups_err_less(tiny_llama, statistics):
    report = outlierq.detect(tiny_llama, stats=statistics, device="cpu")
    assert report.groups and all(0.1 < group.measures["by_output"] < 10 for group in report.groups)


# D-Pruner.


def test_d_pruner_without_importance_drops_what_wanda_drops(w, stats):
    made = d_pruner(w, stats, SCHEME, survivors="stay")
    assert torch.equal(made.weight, wanda(w, stats, SCHEME).weight)


def test_d_pruner_keeps_what_either_text_needs(w, stats):
    needed = torch.zeros(2, ROWS, WIDTH)
    needed[0, :, :40], needed[1, :, 100:140] = 1e6, 1e6  # inputs that general text needs, and domain text
    for importance, kept in ((needed[0], [0]), (needed[1], [1]), (needed.sum(0), [0, 1])):
        made = d_pruner(w, stats, SCHEME, importance=importance + 1e-6)
        for number, part in enumerate((slice(0, 40), slice(100, 140))):
            assert bool((made.weight[:, part] != 0).all()) == (number in kept)


@pytest.mark.parametrize("pattern", ["rows", "matrix", "2:4"])
def test_d_pruner_with_error_feedback_loses_less(pattern, w, stats):
    importance = stats.hessian.diagonal().expand_as(w)
    asked = {"importance": importance, "pattern": pattern}
    plain, fed, rounded = (d_pruner(w, stats, SCHEME, survivors=then, **asked) for then in ("stay", "move", "round"))
    assert lost(w, fed, stats) < lost(w, plain, stats) and torch.equal(fed.weight == 0, plain.weight == 0)
    assert rounded.bits < 4 < fed.bits and not rounded.weight[plain.weight == 0].any()
    assert (fed.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_the_importance_of_two_texts_is_their_sum_per_token():
    outputs, inputs = torch.rand(6, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    one = dual_importance([(outputs, inputs, 10)])
    assert one.shape == (6, 9) and torch.allclose(one, dual_importance([(outputs * 3, inputs * 3, 30)]))
    assert torch.allclose(dual_importance([(outputs, inputs, 10), (outputs, 2 * inputs, 10)]), 3 * one)


def test_d_pruner_needs_what_weights_cost_and_says_how_to_have_it(tiny_llama, statistics, tmp_path):
    (row,) = study(tiny_llama, statistics, "d-pruner 50 %").rows
    assert row.kl is None and "does not say what weights cost" in row.note
    settings = {"samples": 4, "sequence_length": 32, "device": "cpu", "sensitivity": True}
    texts = [outlierq.calibrate(tiny_llama, out=tmp_path / f"{n}", seed=n, **settings).folder for n in (1, 2)]
    dual = outlierq.study_methods(
        tiny_llama, stats=texts[0], general=texts[1], only=["d-pruner 50 %"], group_size=32, windows=2,
        window_length=32, device="cpu",
    )  # fmt: skip
    alone = study(tiny_llama, texts[0], "d-pruner 50 %")
    assert 0 < dual.rows[0].kl != alone.rows[0].kl > 0


# SplitQuant.


def test_k_means_on_a_line_is_as_good_as_every_choice_of_bounds():
    values = torch.cat([torch.randn(30, generator=torch.Generator().manual_seed(s)) + 4 * s for s in range(3)])
    bounds = k_means(values, 3, bins=1 << 12)

    def spread(*bounds: float) -> float:
        number = torch.bucketize(values.double(), torch.tensor(bounds, dtype=torch.float64))
        parts = [values[number == k] for k in range(3)]
        return sum((part - part.mean()).square().sum().item() for part in parts if len(part))

    places = values.sort().values.tolist()
    best = min(spread(a, b) for a, b in itertools.combinations(places[:-1], 2))
    assert spread(*bounds.tolist()) <= best * 1.001
    assert not len(k_means(torch.ones(5), 3)) and len(k_means(torch.tensor([1.0, 2.0]), 3)) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_a_split_errs_less_than_one_grid_and_one_cluster_is_one_grid(bits):
    w = random_weight(32, 128)
    w[::7, ::11] *= 12
    scheme = QuantScheme(bits, None, symmetric=False)
    whole, split = splitquant(w, None, scheme, clusters=1), splitquant(w, None, scheme)
    assert (split.weight - w).square().sum() < (whole.weight - w).square().sum() / 2
    assert whole.bits == pytest.approx(bits, abs=0.01) and bits < split.bits < bits + 1.6
    assert len(whole.weight.unique()) <= 1 << bits and len(split.weight.unique()) <= 3 << bits


# Pruning.


@pytest.mark.parametrize("prune", [wanda, sparsegpt])
def test_two_of_every_four_neighbours_are_left(prune, w, stats):
    made = prune(w, stats, SCHEME, pattern="2:4")
    assert ((made.weight.view(ROWS, -1, 4) != 0).sum(-1) == 2).all() and made.bits == 9


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
def test_error_feedback_beats_scores_and_scores_beat_magnitudes(pattern, w, stats):
    fed, scored, plain = (
        lost(w, made, stats)
        for made in (
            sparsegpt(w, stats, SCHEME, pattern=pattern),
            wanda(w, stats, SCHEME, pattern=pattern),
            wanda(w, stats, SCHEME, pattern=pattern, score="magnitude"),
        )
    )
    assert fed < scored < plain


def test_nothing_is_pruned_at_no_sparsity_and_zeros_survive_rounding(w, stats):
    assert torch.equal(sparsegpt(w, stats, SCHEME, sparsity=0.0).weight, w)
    assert torch.equal(wanda(w, stats, SCHEME, sparsity=0.0).weight, w)
    made = sparsegpt(w, stats, SCHEME, sparsity=0.75, rounds=True)
    assert (made.weight == 0).float().mean() >= 0.74 and made.bits < 3


# Low rank.


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_the_weighed_branch_loses_no_more_output_than_the_plain_one(rank, w, stats):
    weighed, plain = (low_rank(w, hessian, rank, 1e-6) for hessian in (stats.hessian, None))
    errors = [output_error(up @ down - w, stats.hessian).item() for down, up in (weighed, plain)]
    assert errors[0] <= errors[1] * 1.0001
    alike = low_rank(w, torch.eye(WIDTH), rank, 1e-9)
    assert torch.allclose(alike[1] @ alike[0], plain[1] @ plain[0], atol=1e-4)
    tail = torch.linalg.svdvals(w.double())[rank:].square().sum()
    assert (plain[1] @ plain[0] - w).square().sum().item() == pytest.approx(tail.item(), rel=1e-3, abs=1e-6)


def test_a_branch_of_full_rank_is_exact_and_more_rank_loses_less(w, stats):
    ranks = [with_branch(w, stats, SCHEME, rank=rank) for rank in (0, 4, 16, 1000)]
    errors = [lost(w, made, stats) for made in ranks]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 * errors[0]
    assert ranks[0].branch is None and ranks[-1].branch[0].shape == (ROWS, WIDTH)
    assert ranks[1].bits == pytest.approx(ranks[0].bits + 16 * 4 * (ROWS + WIDTH) / (ROWS * WIDTH))


def test_more_rounds_never_lose_more_and_the_parts_of_a_stack_are_its_rows(w, stats):
    one, five = (with_branch(w, stats, SCHEME, rank=8, rounds=rounds, start="branch") for rounds in (1, 5))
    assert lost(w, five, stats) <= lost(w, one, stats)
    parts = [five.rows(0, 10), five.rows(10, ROWS)]
    assert torch.allclose(torch.cat([part.whole for part in parts]), five.whole, atol=1e-6)
    assert parts[0].branch[0] is five.branch[0]


# The comparison.


@pytest.fixture(scope="module")
def statistics(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "stats"
    outlierq.calibrate(tiny_llama, out=out, samples=8, sequence_length=32, device="cpu")
    return out


def study(model, statistics, *only: str, **conditions):
    few = {"group_size": 32, "windows": 2, "window_length": 32, "device": "cpu"}
    return outlierq.study_methods(model, stats=statistics, only=only, **few | conditions)


@pytest.mark.slow
def test_every_contender_has_a_row_with_its_bits_and_its_divergence(tiny_llama, statistics, tmp_path):
    table = study(tiny_llama, statistics, out=tmp_path / "study.md")
    silent = [row for row in table.rows if row.kl is None]
    assert all(row.name.startswith("d-pruner") and "does not say what weights cost" in row.note for row in silent)
    rows = {row.name: row for row in table.rows if row.kl is not None}
    assert len(rows) > 20
    assert all(row.kl > 0 and row.bits > 3 and row.output_error > 0 and row.loads_in for row in rows.values())
    assert rows["gptq"].against_gptq == pytest.approx(1.0)
    assert rows["low rank 8, by output"].bits > rows["gptq"].bits
    assert rows["low rank 8, by output"].output_error < rows["gptq"].output_error < rows["rtn"].output_error
    written = (tmp_path / "study.md").read_text()
    assert all(f"| {name} |" in written for name in rows)
    asked = {row["method"] for row in json.loads((DATA / "contenders.json").read_text()) if "method" in row}
    assert methods("approximate").keys() <= asked


@pytest.mark.parametrize("inputs", ["16", "int8", "int4"])
def test_whole_recipes_have_the_bits_and_the_inputs_of_all_others(inputs):
    learns = [] if inputs == "16" else ["best-w3"]  # with rounded inputs its row says that it does not run
    recipes = [each for each in contenders([], 3) if each.recipe and each.recipe not in learns]
    conditions = Conditions(bits=3, group_size=32, inputs=inputs)
    loaded = [load(each.recipe, [*conditions.settings, *each.settings]).quantize for each in recipes]
    assert len(loaded) > 2 and all((q.bits, q.group_size, q.overrides) == (3, 32, ()) for q in loaded)
    bits = {q.activations and f"int{q.activations.bits}" for q in loaded}
    assert bits == {None if inputs == "16" else inputs}


def test_a_quantizer_in_the_study_is_what_the_pipeline_writes(tiny_llama, statistics, tmp_path):
    settings = {"quantize.group_size": 32, "calibration.sink_weight": 4, "quantize.refine_passes": 2}
    outlierq.quantize(tiny_llama, "gptq-w4", out=tmp_path / "out", stats=statistics, settings=settings, device="cpu")
    measured = outlierq.evaluate(tmp_path / "out", tiny_llama, windows=2, window_length=32, device="cpu", cached=False)
    (row,) = study(tiny_llama, statistics, "gptq").rows
    assert row.kl == pytest.approx(measured.kl, rel=1e-3)


def test_a_recipe_that_runs_the_model_calibrates_on_the_text_of_the_statistics(tiny_llama, statistics):
    (row,) = study(tiny_llama, statistics, "gptaq").rows
    assert 0 < row.kl < 1 and row.bits == 4.5 and not row.note


@pytest.mark.slow
def test_quantized_inputs_cost_more_and_the_branch_reads_them_as_they_were(tiny_llama, statistics):
    plain, rounded = (study(tiny_llama, statistics, "gptq", inputs=inputs).rows[0] for inputs in ("16", "int4"))
    assert rounded.kl > plain.kl
    full, none = (Approximation(torch.eye(8), 4.0, branch) for branch in ((torch.eye(8), torch.eye(8)), None))
    site = LinearSite("0", "0.weight", None, 8, 8, 0)
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for made in (full, none):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
        replace(model, {site: made}, ActivationScheme(bits=4))
        with torch.no_grad():
            outputs.append(model(x))
    assert torch.allclose(outputs[0] - outputs[1], x, atol=1e-6)


def test_sparsities_by_block_keep_their_mean_and_spare_blocks_with_outliers():
    made = sparsities([1.0, 3.0, 2.0], [100, 100, 200], 0.5)
    assert sum(s * n for s, n in zip(made, [100, 100, 200], strict=True)) / 400 == pytest.approx(0.5)
    assert made[1] < made[2] < made[0] and max(made) - min(made) == pytest.approx(0.16)
    assert sparsities([2.0, 2.0], [1, 3], 0.7) == [0.7, 0.7]


@pytest.mark.parametrize("inputs", ["nvfp4", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_4_bit_floats_are_of_weights_and_inputs_and_a_branch_takes_off_most(inputs, tiny_llama, statistics):
    names = ["gptq", "svdquant, rank 32", "olive"]
    rounded, branch, olive = study(tiny_llama, statistics, *names, inputs=inputs).rows
    assert 4.2 < rounded.bits < 4.6 and 0 < branch.kl < 0.5 * rounded.kl
    assert olive.kl is None and "integers only" in olive.note
    with pytest.raises(OutlierqError, match=f"{inputs} has 4 bits, not 3"):
        Conditions(bits=3, inputs=inputs)


def test_unknown_names_and_inputs_are_refused_with_the_nearest(tiny_llama, statistics):
    with pytest.raises(OutlierqError, match="there is no 'gptqq'; did you mean 'gptq'"):
        study(tiny_llama, statistics, "gptqq")
    with pytest.raises(OutlierqError, match="choose 16, int8, int4"):
        study(tiny_llama, statistics, inputs="int2")


@pytest.mark.slow
def test_a_pruned_model_is_written_as_it_was_judged_and_its_report_says_so(tiny_llama, statistics, tmp_path):
    out = tmp_path / "out"
    report = outlierq.study_write(tiny_llama, "sparsegpt 2:4", stats=statistics, out=out, group_size=32, device="cpu")
    assert any("sparsegpt 2:4 leaves them" in note for note in report.notes)
    weights = load_file(out / "model.safetensors")
    linears = [w for name, w in weights.items() if "_proj" in name]
    assert linears and all(((w.view(len(w), -1, 4) != 0).sum(-1) <= 2).all() for w in linears)
    measured = outlierq.evaluate(out, tiny_llama, windows=2, window_length=32, device="cpu", cached=False)
    (row,) = study(tiny_llama, statistics, "sparsegpt 2:4").rows
    assert row.kl == pytest.approx(measured.kl, rel=0.02)  # written in bfloat16
    with pytest.raises(OutlierqError, match="quantize -r gptaq-w4"):
        outlierq.study_write(tiny_llama, "gptaq", stats=statistics, out=tmp_path / "other")


# What is only judged: NoisyQuant's noise, TanQ's levels, ways out for attention.


def test_noise_helps_where_the_condition_says_and_by_how_much():
    step, draws = 1.0, torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for noise in (0.1, 0.3, 0.5):
        added = noise * (2 * draws - 1)
        for distance in torch.arange(0.0, 0.5, 0.04).tolist():
            x = 0.5 - distance  # rounded to 0, whose bin ends at 0.5
            error = (((x + added).round() - added - x) ** 2).mean().item() - x**2
            known = fixed_noise.change(torch.tensor([distance]), noise, step).item()
            assert error == pytest.approx(known, abs=2e-3)
            if abs(known) > 2e-3:
                assert bool(fixed_noise.helps(torch.tensor([distance]), noise, step)) == (error < 0)


def test_noise_costs_values_that_peak_at_zero_and_helps_those_between_steps():
    peaked = 0.1 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    assert fixed_noise.mean_change(peaked, 0.4, 1.0) > 0 > fixed_noise.mean_change(peaked + 0.5, 0.4, 1.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tangent_levels_ascend_from_zero_to_one_and_are_kept_by_rounding(bits):
    for bend in (0.1, 1.0, 1.5):
        levels = tangent.tangent_levels(bits, bend)
        assert len(levels) == 2**bits and (levels.diff() > 0).all() and levels[0] == 0 and abs(levels[-1] - 1) < 1e-12
        assert torch.equal(tangent.on_levels(levels, levels), levels)
    assert torch.allclose(tangent.tangent_levels(bits, 1e-4), tangent.even_levels(bits), atol=1e-6)
    assert tangent.tangent_levels(8, 1.5).diff()[-1] < tangent.tangent_levels(8, 1.5).diff()[0]  # denser near 1
    assert tangent.on_levels(torch.tensor([0.3]), tangent.log_levels(4)).item() == 0.25


def test_the_best_tangent_is_no_worse_than_even_steps_on_softmax():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).mul_(3).softmax(-1)
    bent, even = tangent.best_tangent(x, 4), tangent.even_levels(4)
    lost = [(tangent.on_levels(x, levels) - x).square().sum() for levels in (bent, even)]
    assert lost[0] <= lost[1] * 1.01


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("llama", {}, None),
        ("phi3", {"pad_token_id": 0}, None),
        ("gpt_neox", {"num_key_value_heads": 4}, None),
        ("gpt_oss", {"num_local_experts": 4}, "sink logits of its own"),
        ("qwen3_next", {"num_hidden_layers": 4, "num_experts": 4, "linear_num_key_heads": 2}, "gates"),
    ],
)
def test_attention_with_a_way_out_is_known_by_its_shapes(kind, more, expected):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 1, "bos_token_id": 1}
    sizes |= {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | more
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    names = attention_names(model)
    ways = [way_out(model.get_submodule(name), 4, sizes["num_key_value_heads"], 16, 64) for name in names]
    assert names and set(ways) == {expected} and (expected or "") in sentence(ways)


# Calibration texts.


def test_a_text_agrees_with_itself_and_nonsense_loses_more_on_text(tiny_llama, tmp_path):
    texts = ["embedded", "nonsense", "embedded"]
    settings = {"samples": 8, "sequence_length": 32, "group_size": 32, "device": "cpu"}
    table = outlierq.study_calibration(tiny_llama, texts, **settings)
    assert all(table.error[i][i] == pytest.approx(1.0) for i in range(3))
    assert table.error[0][2] == pytest.approx(1.0) and table.agreement["rank_correlation"][0][2] == pytest.approx(1.0)
    assert table.error[1][0] > 1.02 and table.error[0][1] > 1.02
    for name, matrix in table.agreement.items():
        assert matrix[0][1] == pytest.approx(matrix[1][0]), name
        assert matrix[0][1] >= 1 if name == "scale_ratio" else matrix[0][1] < 1
    assert ("hardly matters" in table.verdict) != table.sensitive
    assert len(table.agreement) == 4 and nonsense(100) == nonsense(100)
    with pytest.raises(OutlierqError, match="at least two"):
        outlierq.study_calibration(tiny_llama, ["embedded"], **settings)
