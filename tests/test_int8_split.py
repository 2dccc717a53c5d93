"""LLM.int8() with found and with fixed outlier columns: the arithmetic, the choice of columns, and whole models."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from outlierq.core.errors import NumbersError, RecipeError, SourceError, StatsError
from outlierq.core.model import Block, Fold, InputGroup, LinearSite
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load import load_model, open_checkpoint, unpacked
from outlierq.load.packed.outlier_split import StaticSplitLinear, decode_split
from outlierq.ops.twins.int8_split import (
    choose_columns,
    column_budget,
    dynamic_split_matmul,
    int8_product,
    split_matmul,
    vectorwise_product,
)
from outlierq.pipeline.block.gather import gather, permuted_stats
from outlierq.quantize.int8_split import int8_split
from outlierq.recipe import load, parse
from outlierq.registry import method
from outlierq.transform.gather_outliers import last_in_runs

SCHEME = QuantScheme(bits=8, group_size=None, activations=ActivationScheme())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and scales [out, 1] of a weight."""
    scale = w.abs().amax(1, keepdim=True) / 127
    return (w / scale).round().to(torch.int8), scale


def plain_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """Vector-wise int8 with numpy's integers, token by token."""
    result = []
    for token in x.numpy().astype(np.float32):
        step = np.float32(np.abs(token).max() / np.float32(127)) or np.float32(1)
        whole = np.rint(token / step).astype(np.int64) @ codes.numpy().astype(np.int64).T
        result.append(whole.astype(np.float32) * (step * scale.numpy()[:, 0]))
    return np.stack(result)


def sqnr_db(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found.double() - expected).square().sum()
    return (10 * (expected.square().sum() / noise).log10()).item()


def statistics(x: torch.Tensor) -> InputStats:
    """Of these tokens [T, K], all of them kept as rows."""
    return InputStats(
        tokens=len(x),
        sequences=1,
        min=x.amin(0),
        max=x.amax(0),
        sum_sq=x.double().square().sum(0),
        hessian=x.T @ x / len(x),
        rows=x.bfloat16(),
    )


def test_the_int32_product_is_exact_for_any_shape():
    for tokens, rows, width in ((1, 3, 7), (17, 24, 40), (4, 5, 0), (0, 5, 8)):
        generator = torch.Generator().manual_seed(tokens)
        a = torch.randint(-127, 128, (tokens, width), dtype=torch.int8, generator=generator)
        b = torch.randint(-127, 128, (rows, width), dtype=torch.int8, generator=generator)
        expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
        assert np.array_equal(int8_product(a, b).numpy(), expected)


def test_without_outliers_both_splits_are_plain_vectorwise_int8_bit_for_bit():
    x, (codes, scale) = drawn(9, 40).half().float(), rounded(drawn(12, 40, seed=1))
    expected = plain_int8(x, codes, scale)
    assert np.array_equal(vectorwise_product(x, codes, scale).numpy(), expected)
    assert np.array_equal(split_matmul(x, codes, scale).numpy(), expected)
    none = torch.empty(0, dtype=torch.long)
    assert np.array_equal(split_matmul(x, codes, scale, none, torch.empty(12, 0)).numpy(), expected)
    assert x.abs().max() < 6
    assert np.array_equal(dynamic_split_matmul(x, codes, scale).numpy(), expected)
    large = x * 128
    assert np.array_equal(dynamic_split_matmul(large, codes, scale, threshold=0), plain_int8(large, codes, scale))


def test_with_every_column_an_outlier_it_is_the_16_bit_product():
    x, w = drawn(5, 24), drawn(8, 24, seed=1).bfloat16()
    codes, scale = rounded(w.float())
    expected = x @ w.float().T
    assert torch.equal(split_matmul(x, codes, scale, torch.arange(24), w), expected)
    assert torch.allclose(dynamic_split_matmul(x, codes, scale, threshold=1e-9, weight=w), expected, atol=1e-6)


def test_tokens_that_are_zero_outside_of_the_outliers_stay_finite():
    x = torch.zeros(3, 16)
    x[1, 4] = 80.0
    codes, scale = rounded(drawn(6, 16))
    columns = torch.tensor([4])
    kept = drawn(6, 1, seed=1)
    found = split_matmul(x, codes, scale, columns, kept)
    assert torch.equal(found[1], 80 * kept[:, 0]) and not found[[0, 2]].any()
    assert dynamic_split_matmul(x, codes, scale).isfinite().all()


def test_codes_in_the_outlier_columns_do_not_count():
    x, (codes, scale) = drawn(4, 16), rounded(drawn(6, 16, seed=1))
    columns, kept = torch.tensor([2, 9]), drawn(6, 2, seed=2)
    assert torch.equal(
        split_matmul(x, codes, scale, columns, kept),
        split_matmul(x, codes.index_fill(1, columns, 99), scale, columns, kept),
    )


def test_the_found_columns_depend_on_the_other_tokens_and_the_fixed_ones_do_not():
    x = drawn(2, 32)
    x[0, 5] = 50.0
    codes, scale = rounded(drawn(8, 32, seed=1))
    alone, together = dynamic_split_matmul(x[1:], codes, scale), dynamic_split_matmul(x, codes, scale)[1:]
    assert not torch.equal(alone, together)
    columns, kept = torch.tensor([5]), drawn(8, 1, seed=2)
    assert torch.equal(
        split_matmul(x, codes, scale, columns, kept)[1:], split_matmul(x[1:], codes, scale, columns, kept)
    )


def test_leading_dimensions_and_the_dtype_are_kept():
    codes, scale = rounded(drawn(8, 32))
    found = split_matmul(drawn(2, 3, 32).bfloat16(), codes, scale)
    assert found.shape == (2, 3, 8) and found.dtype == torch.bfloat16


def test_signal_to_noise_is_that_of_the_known_example():
    """X ~ N(0, 1), two channels x60, W ~ N(0, 0.02^2): 19.5 dB plain, 40.0 as bitsandbytes, 42.7 with 16-bit W.

    A single draw of the two channels moves the figures by 0.3 dB, so three are averaged.
    """
    columns, found = torch.tensor([100, 2000]), []
    for seed in range(3):
        random = np.random.default_rng(seed)
        x = torch.tensor(random.standard_normal((256, 4096)), dtype=torch.float32)
        w = torch.tensor(random.standard_normal((512, 4096)) * 0.02, dtype=torch.float32)
        x[:, columns] *= 60
        expected = x.double() @ w.double().T
        codes, scale = rounded(w)
        results = (
            vectorwise_product(x, codes, scale),
            dynamic_split_matmul(x, codes, scale),
            split_matmul(x, codes, scale, columns, w[:, columns].bfloat16()),
        )
        found.append([sqnr_db(y, expected) for y in results])
    assert np.mean(found, axis=0) == pytest.approx([19.5, 40.0, 42.7], abs=0.5)


def test_the_budget_is_whole_tiles_and_fits_narrow_layers():
    assert [column_budget(width) for width in (8, 576, 4096, 14336)] == [8, 16, 32, 80]


def test_planted_outlier_channels_are_kept_as_they_were():
    x, w = drawn(200, 256), drawn(32, 256, seed=1)
    planted = [3, 77, 200]
    x[:, planted] *= 40
    result = int8_split(w, statistics(x), SCHEME)
    assert set(planted) <= set(result.outlier_columns.tolist()) and len(result.outlier_columns) == 16
    columns = result.outlier_columns
    assert (columns.diff() > 0).all() and not result.codes[:, columns].any()
    assert torch.equal(result.dequantize()[:, columns], w[:, columns].bfloat16().float())


def test_a_weight_in_an_outlier_column_does_not_widen_the_scale():
    x, w = drawn(200, 256), drawn(4, 256, seed=1)
    x[:, 3] *= 40
    w[:, 3] = 1000.0
    result = int8_split(w, statistics(x), SCHEME)
    assert result.scale.float().max() < 0.05


def test_one_huge_token_is_no_outlier_channel():
    x = drawn(4000, 64)
    x[17, 5] = 500.0
    _, rare = choose_columns(statistics(x), threshold=6.0, ratio=20.0, min_rate=0.001)
    _, counted = choose_columns(statistics(x), threshold=6.0, ratio=20.0, min_rate=0.0)
    assert (rare, counted) == (0, 1)


def test_the_ratio_finds_outliers_that_never_reach_the_threshold():
    x = drawn(400, 256) * 0.01
    x[:, 9] *= 60
    columns, found = choose_columns(statistics(x), threshold=6.0, ratio=20.0, min_rate=0.001)
    assert found == 1 and 9 in columns.tolist()


def test_the_split_works_with_every_scheme():
    x, w = drawn(100, 64), drawn(8, 64, seed=1)
    for scheme in (QuantScheme(4, 32), QuantScheme(3, 32, False), QuantScheme(8, None, False)):
        result = int8_split(w, statistics(x), scheme)
        columns = result.outlier_columns
        assert not result.codes[:, columns].any()
        assert torch.equal(result.dequantize()[:, columns], w[:, columns].bfloat16().float())


@pytest.mark.parametrize(
    ("form", "method", "said"),
    [
        ("compressed-tensors", "int8_split", "cannot keep outlier columns"),
        ("bitsandbytes", "int8_split", "cannot keep outlier columns"),
        ("outlierq-split", "rtn", "is the format of `int8_split`"),
        ("bitsandbytes", "gptq", "largest weight"),
    ],
)
def test_a_recipe_whose_format_cannot_hold_its_method_is_refused(form, method, said):
    section = f"quantize: {{method: {method}, bits: 8, group_size: channel}}"
    with pytest.raises(RecipeError, match=said):
        parse(f"calibration: {{}}\n{section}\nexport: {{format: {form}}}\n")


def test_both_recipes_bind():
    assert load("llm-int8").needs == frozenset()
    assert {"min", "max", "rows"} <= load("int8-split").needs


@pytest.fixture(scope="module")
def split_folder(tiny_llama, tmp_path_factory):
    """The tiny model through recipe int8-split."""
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize

    out = tmp_path_factory.mktemp("split") / "out"
    recipe = load("int8-split", ["calibration.samples=6", "calibration.sequence_length=32"])
    plan = make_plan(open_checkpoint(str(tiny_llama)), recipe)
    quantize(plan, out)
    written = sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json")
    assert written == plan.output_bytes
    return out


def test_the_written_model_runs_its_split(split_folder, tiny_llama):
    model, plain = load_model(open_checkpoint(str(split_folder))), load_model(open_checkpoint(str(tiny_llama)))
    layers = [part for part in model.modules() if isinstance(part, StaticSplitLinear)]
    assert len(layers) == 14 and all(len(layer.columns) == 16 for layer in layers)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        found, expected = model(ids).logits, plain(ids).logits
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < error < 0.03


def test_a_layer_of_the_written_model_is_int8_outside_of_its_columns(split_folder):
    model = load_model(open_checkpoint(str(split_folder)))
    layer = model.model.layers[0].mlp.down_proj
    x = drawn(5, 96)
    low, kept = x.clone(), layer.columns
    low[:, kept] = 0
    expected = (
        plain_int8(low, layer.weight, layer.scale.float()) + (x[:, kept] @ layer.outlier_weight.float().T).numpy()
    )
    assert np.allclose(layer(x).numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_reading_it_as_a_plain_checkpoint_gives_the_dense_weights(split_folder, tiny_llama):
    stored, plain = unpacked(open_checkpoint(str(split_folder))), open_checkpoint(str(tiny_llama))
    name = "model.layers.1.self_attn.q_proj.weight"
    found, expected = stored.read(name), plain.read(name).float()
    columns = stored.parts(name)["outlier_columns"].long()
    assert torch.equal(found[:, columns], expected[:, columns])
    assert ((found - expected).norm() / expected.norm()).item() < 0.02
    assert set(stored.tensors) == set(plain.tensors)


def test_sites_with_one_input_keep_the_same_columns(split_folder):
    stored = unpacked(open_checkpoint(str(split_folder)))
    columns = [stored.parts(f"model.layers.0.self_attn.{n}_proj.weight")["outlier_columns"].tolist() for n in "qkv"]
    assert columns[0] == columns[1] == columns[2]


def dense_result(model, out, recipe: str) -> dict:
    """Run a recipe on a model folder; the report."""
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize

    return quantize(make_plan(open_checkpoint(str(model)), parse(recipe)), out)


GATHERED = """
calibration: {samples: 6, sequence_length: 32}
transform: [gather_outliers]
quantize: {method: int8_split, bits: 8, group_size: channel}
export: {format: dense}
"""


def test_gathering_the_outlier_columns_changes_nothing_and_puts_them_last(untied_llama, tmp_path):
    """float32, biases, two query heads for a key-value head: the same logits with and without the permutations."""
    plain = dense_result(untied_llama, tmp_path / "plain", GATHERED.replace("transform: [gather_outliers]", ""))
    report = dense_result(untied_llama, tmp_path / "gathered", GATHERED)
    assert not plain.transforms
    notes = {row["group"].rpartition(".")[2]: row["note"] for row in report.transforms}
    assert notes == {
        "o_proj": "16 channels moved to the ends of their heads",
        "down_proj": "16 channels moved to the end",
    }
    models = [load_model(open_checkpoint(str(tmp_path / name))) for name in ("plain", "gathered")]
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        expected, found = (model(ids).logits for model in models)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert not torch.equal(*weights)
    original = open_checkpoint(str(untied_llama)).read("model.layers.0.mlp.down_proj.weight")
    kept = models[1].model.layers[0].mlp.down_proj.weight[:, -16:]
    same = (kept[:, :, None] == original[:, None, :]).all(0).any(1)
    assert same.all()  # the last 16 columns are original ones, in 16 bits or more; rounded columns equal none
    rounded_ones = models[1].model.layers[0].mlp.down_proj.weight[:, :-16]
    assert not (rounded_ones[:, :, None] == original[:, None, :]).all(0).any()


def test_orders_stay_inside_of_heads_and_are_shared_by_query_heads():
    index = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7])  # 4 query heads of 4, 2 key-value heads
    assert last_in_runs(torch.tensor([0]), index, 16) is None
    channels, rows = last_in_runs(torch.tensor([0, 13]), index, 4)
    assert rows.tolist() == [1, 2, 3, 0, 4, 6, 7, 5]
    assert channels.view(4, 4).tolist() == [[1, 2, 3, 0], [5, 6, 7, 4], [8, 10, 11, 9], [12, 14, 15, 13]]
    assert torch.equal(index[channels], rows[index])


def test_permuted_statistics_are_those_of_the_permuted_inputs():
    x, order = drawn(50, 12), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found, expected = permuted_stats(statistics(x), order), statistics(x[:, order])
    assert set(found.tensors()) == set(expected.tensors())
    for name, value in expected.tensors().items():
        assert torch.allclose(found.tensors()[name], value), name


@pytest.mark.parametrize("name", ["int8_split", "gather_outliers"])
@pytest.mark.parametrize("fault", ["no rows", "no tokens", "NaN"])
def test_statistics_that_cannot_choose_columns_are_refused_with_advice(name, fault):
    stats, spoiled = statistics(drawn(64, 32)), drawn(8, 32)
    spoiled[3, 4] = float("nan")
    damaged = {
        "no rows": replace(stats, rows=None),
        "no tokens": replace(stats, tokens=0),
        "NaN": replace(stats, rows=spoiled),
    }[fault]
    said, kind = {
        "no rows": ("do not hold `rows`", StatsError),
        "no tokens": ("no token reached this input", StatsError),
        "NaN": ("`rows` holds a NaN", NumbersError),
    }[fault]
    with pytest.raises(kind, match=said) as raised:
        if name == "int8_split":
            method("quantize", name).function(drawn(16, 32), damaged, SCHEME)
        else:
            method("permute", name).function(damaged)
    assert "calibrate" in raised.value.hint


def linear_group() -> tuple[Block, InputGroup]:
    """up -> down, as gathering sees it."""
    up, down = (LinearSite(f"b.0.{n}", f"b.0.{n}.weight", None, 32, 32, 0) for n in ("up", "down"))
    group = InputGroup("b.0.down", (down,), Fold("linear", up.weight, None, tuple(range(32))))
    return Block(0, "b.0", (up, down), (up.weight, down.weight)), group


def test_an_input_that_no_token_reached_is_not_gathered_and_the_report_says_so():
    block, group = linear_group()
    chosen = method("permute", "gather_outliers"), {}
    for stats in ({}, {"b.0.down": replace(statistics(drawn(64, 32)), tokens=0)}):
        found, rows = gather(block, [group], stats, {}, chosen, None, lambda before, after: None)
        assert found == stats
        assert [(row["group"], row["note"]) for row in rows] == [
            ("b.0.down", "left as it is: no token reached it during calibration")
        ]


def test_statistics_that_cannot_be_gathered_by_name_the_group():
    block, group = linear_group()
    stats = {"b.0.down": replace(statistics(drawn(64, 32)), rows=None)}
    with pytest.raises(StatsError) as raised:
        gather(block, [group], stats, {}, (method("permute", "gather_outliers"), {}), None, lambda before, after: None)
    assert raised.value.where == "transform gather_outliers on b.0.down"


def test_gathering_needs_the_model(tiny_llama, tmp_path):
    from outlierq.pipeline.calibrate import calibrate
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize

    recipe, checkpoint = parse(GATHERED), open_checkpoint(str(tiny_llama))
    calibrate(checkpoint, recipe.calibration, tmp_path / "stats")
    with pytest.raises(RecipeError, match="leave --stats out"):
        quantize(make_plan(checkpoint, recipe), tmp_path / "out", stats=tmp_path / "stats")


def test_columns_that_do_not_fit_are_refused():
    good = {"weight": torch.zeros(2, 4, dtype=torch.int8), "weight_scale": torch.ones(2, 1)}
    for columns in ([1, 1], [3, 4], [-1, 0]):
        with pytest.raises(SourceError, match="outlier columns"):
            decode_split(**good, outlier_columns=torch.tensor(columns), outlier_weight=torch.ones(2, 2))
    with pytest.raises(SourceError, match="need weights"):
        decode_split(**good, outlier_columns=torch.tensor([1]), outlier_weight=torch.ones(2, 2))


def test_an_unknown_format_of_ours_is_refused(split_folder, tmp_path):
    import shutil

    folder = shutil.copytree(split_folder, tmp_path / "later")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = "outlierq-later"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="outlierq-later"):
        unpacked(open_checkpoint(str(folder)))


def test_the_stress_model_loses_no_more_than_the_plain_one(tiny_llama):
    """The split takes the planted channels out of the int8 product, so they cost nothing."""
    x, w = drawn(300, 256), drawn(64, 256, seed=1)
    planted = torch.tensor([1, 50, 99, 130, 200, 255])
    stressed, weight = x.clone(), w.clone()
    stressed[:, planted] *= 64
    weight[:, planted] /= 64
    errors = []
    for inputs, matrix in ((x, w), (stressed, weight)):
        kept = int8_split(matrix, statistics(inputs), SCHEME)
        found = split_matmul(inputs, kept.codes, kept.scale, kept.outlier_columns, kept.outlier_weight)
        errors.append((found - inputs @ matrix.T).norm().item())
    assert errors[1] < 1.05 * errors[0]
