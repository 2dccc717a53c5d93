"""Quantized inputs: static scales by output error, what is written, and what a model computes that was read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from libraries import narrow_blocks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from outlierq.core.errors import NumbersError, RecipeError, StatsError
from outlierq.core.model import LinearSite
from outlierq.core.report import Report
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.load import load_model, open_checkpoint
from outlierq.ops import activations
from outlierq.ops.activations import fake_quantize
from outlierq.ops.search.clip_search import static_scale, weighed_rows
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import quantize
from outlierq.quantize.stage import quantize_group
from outlierq.recipe import load, parse
from outlierq.registry import method

STATIC = ActivationScheme("int", dynamic=False, per="tensor")
STATIC_FP8 = ActivationScheme("float", dynamic=False, per="tensor")
IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))


def rows_with_spikes(size: float = 60.0, seed: int = 0) -> torch.Tensor:
    """[512, 64] normal inputs of which a few are far larger, in a channel that the weights below hardly read."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 64, generator=rng)
    x[::50, 5] *= size
    return x


def light_weight(seed: int = 1) -> torch.Tensor:
    """[96, 64], small where the spikes are."""
    w = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
    w[:, 5] *= 1e-3
    return w


def stats_of(x: torch.Tensor, **more: torch.Tensor) -> InputStats:
    low, high = x.amin(0), x.amax(0)
    return InputStats(tokens=len(x), sequences=4, min=low, max=high, rows=x.bfloat16(), **more)


def error_of(scale: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scheme: ActivationScheme) -> float:
    """Mean squared change of the output, the plain way."""
    x = x.bfloat16().float()
    return ((fake_quantize(x, scheme, scale) - x) @ w.T).square().mean().item()


# The scale of a static scheme.


@pytest.mark.parametrize("scheme", [STATIC, STATIC_FP8])
@pytest.mark.parametrize("rows", [32, 96])  # fewer and more outputs than inputs: two ways to compute the same error
def test_the_searched_scale_is_the_best_of_a_fine_brute_force_grid_to_a_few_percent(scheme, rows):
    x, w = rows_with_spikes(), light_weight()[:rows]
    found = error_of(static_scale(w, stats_of(x), scheme, torch.float32), x, w, scheme)
    full = x.abs().max() / scheme.code_max
    shares = torch.logspace(-8, 0, 400, base=2)
    best = min(error_of((full * share).reshape(1), x, w, scheme) for share in shares)
    assert best <= found * (1 + 1e-6) and found <= 1.05 * best


def test_clipping_pays_where_spikes_are_hardly_read_and_nothing_is_clipped_where_they_are():
    x, w = rows_with_spikes(), light_weight()
    full = x.bfloat16().float().abs().max() / 127
    assert static_scale(w, stats_of(x), STATIC, torch.float32).item() < 0.2 * full
    w[:, 5] = 30.0
    assert static_scale(w, stats_of(x), STATIC, torch.float32).item() > 0.9 * full


@pytest.mark.parametrize("seed", range(5))
def test_the_searched_scale_never_errs_more_than_the_one_that_holds_everything(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 24, generator=rng) ** (1 + 2 * (seed % 3)) * torch.rand(24, generator=rng)
    w = torch.randn(40, 24, generator=rng)
    searched, plain = (static_scale(w, stats_of(x), STATIC, torch.bfloat16, search=s).float() for s in (True, False))
    assert error_of(searched, x, w, STATIC) <= error_of(plain, x, w, STATIC)
    torch.testing.assert_close(plain, (x.abs().max() / 127).reshape(1).bfloat16().float())


def test_first_tokens_count_as_often_as_they_were_seen():
    x = rows_with_spikes()
    rows, counts = weighed_rows(stats_of(x, first_rows=x[:4]))
    assert rows.shape == (516, 64) and counts[-4:].tolist() == [1.0] * 4
    assert counts[:512].sum().item() == pytest.approx(508)
    _, plain = weighed_rows(stats_of(x))
    assert plain.sum().item() == pytest.approx(512)


def test_a_sink_that_no_sampled_row_shows_is_not_clipped():
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(512, 64, generator=rng)
    first = torch.randn(4, 64, generator=rng)
    first[:, 7] = 500.0
    w = light_weight()
    seen = InputStats(4096, 4, min=-first.abs().amax(0), max=first.abs().amax(0), rows=x, first_rows=first)
    assert static_scale(w, seen, STATIC, torch.float32).item() > 0.5 * 500 / 127


def test_statistics_without_rows_or_with_a_nan_are_refused():
    x = rows_with_spikes()
    without = InputStats(tokens=512, sequences=4, min=x.amin(0), max=x.amax(0))
    with pytest.raises(StatsError, match="do not hold `rows`") as raised:
        static_scale(light_weight(), without, STATIC, torch.float32)
    assert "calibrate again" in raised.value.hint
    x[3, 3] = float("nan")
    with pytest.raises(NumbersError, match="NaN"):
        static_scale(light_weight(), stats_of(x), STATIC, torch.float32)


def test_an_input_of_zeros_gets_the_scale_one():
    assert static_scale(light_weight(), stats_of(torch.zeros(8, 64)), STATIC, torch.float32).tolist() == [1.0]


# One input group.


def group(scheme: QuantScheme, count: int = 2) -> tuple[dict, dict]:
    sites = [LinearSite(f"b.{i}", f"b.{i}.weight", None, 96, 64, 0) for i in range(count)]
    return {s: light_weight(i) for i, s in enumerate(sites)}, dict.fromkeys(sites, scheme)


def test_linears_that_share_an_input_share_its_static_scale():
    weights, schemes = group(QuantScheme(8, None, activations=STATIC))
    done = quantize_group(weights, schemes, stats_of(rows_with_spikes()), method("quantize", "rtn"), {})
    first, second = (quantized.input_scale for quantized, _ in done.values())
    assert torch.equal(first, second) and first.shape == (1,) and first.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", [STATIC, ActivationScheme(), ActivationScheme("float")])
def test_the_reported_error_is_that_of_both_operands(scheme):
    weights, schemes = group(QuantScheme(8, None, kind=scheme.kind, activations=scheme), count=1)
    x = rows_with_spikes()
    ((site, w),) = weights.items()
    quantized, row = quantize_group(weights, schemes, stats_of(x), method("quantize", "rtn"), {})[site]
    x = x.bfloat16().float()
    found = fake_quantize(x, scheme, quantized.input_scale) @ quantized.dequantize().T
    expected = ((found - x @ w.T).square().sum() / (x @ w.T).square().sum()).item()
    assert row.output_error == pytest.approx(expected, rel=1e-4)
    only_weights = ((x @ (quantized.dequantize() - w).T).square().sum() / (x @ w.T).square().sum()).item()
    assert row.output_error > 1.5 * only_weights


def test_a_group_of_unlike_heights_is_solved_linear_by_linear_where_blocks_would_reach_over_edges():
    scheme = QuantScheme(8, None, kind="float", block=(64, 64))
    weights, schemes = group(scheme)  # 96 rows are one and a half blocks
    x = rows_with_spikes()
    seen = stats_of(x, hessian=x.T @ x / len(x))
    done = quantize_group(weights, schemes, seen, method("quantize", "rtn"), {})
    for site, w in weights.items():
        alone = method("quantize", "rtn").function(w, None, scheme)
        assert torch.equal(done[site][0].scale, alone.scale) and done[site][0].scale.shape == (2, 1)


# Whole models.


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory, tools) -> Path:
    """Float32, a head of its own; some linears divide into blocks of 128 x 128 and some do not."""
    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
    return tools.write_llama(folder, dtype="float32", seed=3, **sizes)


def plan_of(source: Path, recipe: str, *settings: str) -> Plan:
    small = ["calibration.samples=6", "calibration.sequence_length=32"] if load(recipe).calibration else []
    return make_plan(open_checkpoint(str(source)), load(recipe, [*small, *settings]))


def compress(source: Path, out: Path, recipe: str, *settings: str) -> Report:
    return quantize(plan_of(source, recipe, *settings), out)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def steps_of_the_package(monkeypatch):
    """compressed-tensors simulates int8 inputs with scales of max|x| / 127.5; kernels, and we, divide by 127."""

    def scale(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
        return x.abs().amax(-1, keepdim=True) / (127.5 if scheme.kind == "int" else 448)

    monkeypatch.setattr(activations, "dynamic_scale", scale)


@pytest.mark.parametrize(
    ("recipe", "settings", "form"),
    [
        ("w8a8-dynamic", (), "int-quantized"),
        ("w8a8-dynamic", ("calibration={samples: 6, sequence_length: 32}", "quantize.method=gptq"), "int-quantized"),
        ("w8a8-static", (), "int-quantized"),
        ("w8a8-static", ("quantize.activations.clip_search=none",), "int-quantized"),
        ("w4a8", ("quantize.group_size=64",), "int-quantized"),
        ("fp8-dynamic", (), "float-quantized"),
        pytest.param("fp8-block", (), "float-quantized", marks=narrow_blocks),
        (
            "fp8-block",
            ("quantize.overrides=[{match: '*mlp*', kind: int, bits: 4, group_size: 64, activations: none}]",),
            "mixed-precision",
        ),
        ("w8a8-static", ("quantize.overrides=[{match: '*v_proj', activations: none}]",), "mixed-precision"),
        ("fp8-dynamic", ("quantize.activations=",), "float-quantized"),
    ],
)
@pytest.mark.usefixtures("steps_of_the_package")
def test_our_model_computes_what_transformers_computes(recipe, settings, form, wide_llama, tmp_path):
    out = tmp_path / "out"
    compress(wide_llama, out, recipe, *settings)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == form
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(out).eval())
    ours = logits_of(load_model(open_checkpoint(str(out))))
    original = logits_of(load_model(open_checkpoint(str(wide_llama))))
    assert distance(ours, theirs) < 1e-4
    # The difference that quantization makes is far above that, so the two agree on it.
    assert 0.005 < distance(ours, original) < 0.5


def test_the_step_of_kernels_and_that_of_the_package_differ_by_less_than_quantization_does(wide_llama, tmp_path):
    out = tmp_path / "out"
    compress(wide_llama, out, "w8a8-dynamic")
    ours = logits_of(load_model(open_checkpoint(str(out))))
    theirs = logits_of(AutoModelForCausalLM.from_pretrained(out).eval())
    original = logits_of(load_model(open_checkpoint(str(wide_llama))))
    assert 0 < distance(ours, theirs) < 1.1 * distance(theirs, original)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_tensors_on_disk_are_those_of_the_formats(wide_llama, tmp_path):
    query = "model.layers.0.self_attn.q_proj"
    compress(wide_llama, tmp_path / "static", "w8a8-static")
    found = tensors_of(tmp_path / "static")
    assert found[f"{query}.weight"].dtype == torch.int8 and found[f"{query}.weight"].shape == (128, 128)
    assert found[f"{query}.weight_scale"].shape == (128, 1) and found[f"{query}.input_scale"].shape == (1,)
    compress(wide_llama, tmp_path / "w4a8", "w4a8", "quantize.group_size=64")
    found = tensors_of(tmp_path / "w4a8")
    codes = found[f"{query}.weight"]
    assert codes.dtype == torch.int8 and codes.min() >= -8 and codes.max() <= 7
    assert found[f"{query}.weight_scale"].shape == (128, 2) and f"{query}.input_scale" not in found
    compress(wide_llama, tmp_path / "fp8", "fp8-block")
    found = tensors_of(tmp_path / "fp8")
    assert found[f"{query}.weight"].dtype == torch.float8_e4m3fn and found[f"{query}.weight_scale"].shape == (1, 1)
    assert found["model.layers.0.mlp.down_proj.weight_scale"].shape == (1, 2)
    assert found["model.layers.0.self_attn.k_proj.weight_scale"].shape == (64, 1)


@pytest.mark.parametrize("recipe", ["w8a8-static", "w4a8", "fp8-block", "fp8-dynamic"])
def test_the_planned_size_is_the_written_size(recipe, wide_llama, tmp_path):
    plan = plan_of(wide_llama, recipe)
    report = quantize(plan, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "outlierq.json")
    assert plan.output_bytes == report.output_bytes == written


def test_sequential_mode_runs_with_quantized_inputs(wide_llama, tmp_path):
    report = compress(wide_llama, tmp_path / "out", "w8a8-static", "calibration.mode=sequential")
    assert all(0 < row.output_error < 0.01 for row in report.rows)
    assert any("sequential" in note and "16 bit" in note for note in report.notes)


# What the plan decides.


def schemes_of(plan: Plan) -> dict[str, QuantScheme | None]:
    return {planned.site.module: planned.scheme for planned in plan.sites}


@pytest.mark.parametrize("policy", ["smaller-group", "per-channel"])
def test_shapes_that_blocks_do_not_divide_get_a_scale_per_channel(policy, wide_llama):
    plan = plan_of(wide_llama, "fp8-block", f"quantize.when_indivisible={policy}")
    schemes = schemes_of(plan)
    assert schemes["model.layers.0.self_attn.q_proj"].block == (128, 128)
    narrow = schemes["model.layers.0.self_attn.k_proj"]
    assert narrow.block is None and narrow.kind == "float" and narrow.activations.per == "token"
    assert "k_proj and 3 more: per channel: 64 x 128 weights are not a multiple of blocks 128 x 128" in plan.notes[0]


def test_shapes_that_blocks_do_not_divide_can_be_kept_or_refused(wide_llama):
    plan = plan_of(wide_llama, "fp8-block", "quantize.when_indivisible=keep")
    assert schemes_of(plan)["model.layers.1.self_attn.v_proj"] is None
    with pytest.raises(RecipeError, match="4 linears cannot follow the recipe"):
        plan_of(wide_llama, "fp8-block", "quantize.when_indivisible=error")


def test_a_narrower_group_keeps_the_scheme_of_its_inputs(tiny_llama):
    down = schemes_of(plan_of(tiny_llama, "w4a8"))["model.layers.0.mlp.down_proj"]
    assert (down.group_size, down.activations) == (32, ActivationScheme())


def test_a_head_without_statistics_is_kept_when_its_input_scale_would_be_static(wide_llama):
    plan = plan_of(wide_llama, "w8a8-static", "quantize.ignore=[]")
    assert schemes_of(plan)["lm_head"] is None
    assert any("lm_head" in note and "nothing is known of its inputs" in note for note in plan.notes)
    assert schemes_of(plan_of(wide_llama, "w8a8-dynamic", "quantize.ignore=[]"))["lm_head"] is not None


def test_the_plan_says_what_clients_make_of_it(wide_llama):
    said = {name: "\n".join(plan_of(wide_llama, name).clients) for name in ("w8a8-static", "w4a8")}
    # The blocks do not divide its k and v, which vLLM merges with q.
    assert "does not load" in "\n".join(plan_of(wide_llama, "fp8-block").clients)
    alike = "quantize.ignore=['*q_proj', '*k_proj', '*v_proj']"
    said["fp8-block"] = "\n".join(plan_of(wide_llama, "fp8-block", alike).clients)
    assert "computes scales per token instead" in said["w8a8-static"]
    assert "slow without AMX-FP8" in said["fp8-block"]
    assert "vLLM 0.32 (CPU build): loads" in said["w4a8"]


# Recipes that cannot work.

RTN8 = "quantize: {method: rtn, bits: 8, group_size: channel%s}\n"


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        (", kind: float, symmetric: false", "quantize.symmetric: `kind: float` has no zero points"),
        (", block: [128, 128]", "quantize.block: only weights of `kind: float`"),
        (", symmetric: false, activations: {}", "quantize.activations.kind: quantized inputs need symmetric weights"),
        (", activations: {kind: float}", "quantize.activations.kind: must be that of the weights, int"),
        (", activations: {per: tensor}", "quantize.activations.per: scales computed at run time are per `token`"),
        (", activations: {dynamic: false}", "quantize.activations.per: a static scale is one per `tensor`"),
        (", activations: {per: group}", "`group` belongs to weights with a `block`"),
        (", activations: {clip_search: none}", "quantize.activations.clip_search: scales computed at run time"),
        (", activations: {bits: 5}", "quantize.activations.bits: Input should be 4 or 8"),
        (", activations: {dynamic: false, per: tensor}", "the methods need abs_max, first_rows, rows"),
        (
            ", kind: float, block: [128, 64], activations: {kind: float, per: group}",
            "groups of inputs have 128 columns",
        ),
        (", kind: float, block: [128]", "quantize.block.1: Field required"),
        (
            ", overrides: [{match: x}, {match: y, kind: float, bits: 5}]",
            "quantize.overrides.1.bits: `kind: float` is E4M3 with 8 bits, E2M3 with 6 or E2M1 with 4 (this is 5)",
        ),
    ],
)
def test_what_no_client_can_run_is_said_with_its_key(extra, fault):
    with pytest.raises(RecipeError) as raised:
        parse(RTN8 % extra)
    assert fault in raised.value.what


def test_float_weights_need_a_channel_or_a_block():
    with pytest.raises(RecipeError, match="one scale per `channel`, or per `block"):
        parse("quantize: {method: rtn, bits: 8, kind: float}\n")
    with pytest.raises(RecipeError, match="leave it out where `block` is given"):
        parse("quantize: {method: rtn, bits: 8, kind: float, block: [128, 128], group_size: 64}\n")


def test_dense_weights_cannot_say_that_inputs_are_quantized():
    with pytest.raises(RecipeError, match=r"activations: `export.format: dense` cannot say"):
        parse(RTN8 % ", activations: {}" + "export: {format: dense}\n")


def test_an_override_may_leave_inputs_in_16_bits_or_replace_a_block():
    text = "kind: float, bits: 8, block: [128, 128], activations: {kind: float, per: group}"
    overrides = "[{match: a, activations: none}, {match: b, group_size: channel, activations: {kind: float}}]"
    recipe = parse(f"quantize: {{method: rtn, {text}, overrides: {overrides}}}\n")
    assert recipe.scheme_for("a", "bfloat16") == QuantScheme(8, None, kind="float", block=(128, 128))
    token = ActivationScheme("float")
    assert recipe.scheme_for("b", "bfloat16") == QuantScheme(8, None, kind="float", activations=token)
