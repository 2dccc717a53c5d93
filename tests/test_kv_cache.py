"""Scales of an fp8 KV cache: from keys after RoPE and values, moved with folds, written, read back and run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from libraries import rounded_cache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import outlierq
from outlierq.core.errors import ArgumentError, NumbersError, RecipeError, SourceError, StatsError
from outlierq.core.measured.block_stats import BlockStats
from outlierq.core.model import Fold, InputGroup
from outlierq.core.scheme import CacheScheme
from outlierq.load import load_model, open_checkpoint
from outlierq.load.model.attention import SERVED_CACHES, attention_names, served_rounding, stored_prefix
from outlierq.pipeline.block.kv_cache import cache_tensors, moved_values
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import CachePlan, Plan
from outlierq.pipeline.quantize import quantize
from outlierq.quantize.kv_cache import cache_scale
from outlierq.recipe import load, parse

SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
IDS = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(5))
PER_HEAD = CacheScheme("head")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tools) -> Path:
    """Float32, 4 heads and 2 key-value heads."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return tools.write_llama(folder, dtype="float32", seed=4, tie_word_embeddings=False)


def plan_of(source: Path, recipe: str, *settings: str) -> Plan:
    return make_plan(open_checkpoint(str(source)), load(recipe, [*SMALL, *settings]))


def logits_of(model: torch.nn.Module, ids: torch.Tensor = IDS, **more: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def keys_and_values(folder: Path, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[sequences, kv heads, tokens, D] of every block as transformers' own cache holds them: keys after RoPE."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


# One scale.


def test_a_scale_maps_the_largest_value_to_448():
    seen = torch.tensor([[1.0, 4.48], [2.24, 0.5]])
    torch.testing.assert_close(cache_scale(seen, CacheScheme(), torch.float32), torch.tensor([0.01]))
    heads = cache_scale(seen, PER_HEAD, torch.float32)
    torch.testing.assert_close(heads, torch.tensor([0.01, 0.005]).view(2, 1, 1))


def test_a_head_of_zeros_has_a_scale_that_16_bits_hold():
    for dtype in (torch.bfloat16, torch.float16):
        assert (cache_scale(torch.zeros(2, 4), PER_HEAD, dtype) > 0).all()


def test_keys_that_are_not_finite_are_refused():
    with pytest.raises(NumbersError, match="NaN or Inf"):
        cache_scale(torch.tensor([[1.0, float("nan")]]), CacheScheme(), torch.float32)
    with pytest.raises(NumbersError, match=r"cannot be stored as torch\.float16"):
        cache_scale(torch.tensor([[1e9]]), CacheScheme(), torch.float16)


# Which module, and under which name.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_is_found_by_what_its_code_calls(implementation):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 20, "attn_implementation": implementation}
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    assert attention_names(llama) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    assert attention_names(neox.gpt_neox.layers[1]) == ["attention"]
    assert attention_names(llama.model.layers[0].mlp) == []


def test_the_name_is_spelled_as_the_checkpoint_spells_it():
    names = {"transformer.h.0.attn.c_attn.weight": "h.0.attn.c_attn.weight"}
    assert stored_prefix("transformer.h.0.attn", names) == "h.0.attn"
    with pytest.raises(SourceError, match=r"no tensor of transformer\.h\.1\.attn"):
        stored_prefix("transformer.h.1.attn", names)


# Values that a transform moved.


def test_scales_follow_a_fold_into_the_values_of_grouped_heads():
    """2 kv heads of size 3, 2 query heads each: input channel (h, d) of o_proj is fed by value (h // 2, d)."""
    rng = torch.Generator().manual_seed(0)
    index = tuple(int(h // 2 * 3 + d) for h in range(4) for d in range(3))
    fold = Fold("linear", "a.v_proj.weight", "a.v_proj.bias", index)
    weight, bias, x = (torch.randn(*shape, generator=rng) for shape in ((6, 5), (6,), (40, 5)))
    scale, shift = torch.rand(6, generator=rng) + 0.5, torch.randn(6, generator=rng)
    before = {fold.weight: weight, fold.bias: bias}
    after = {fold.weight: weight / scale[:, None], fold.bias: (bias - shift) / scale}
    values = x @ weight.T + bias
    moved = x @ after[fold.weight].T + after[fold.bias]
    bound = moved_values(values.abs().amax(0).view(2, 3), fold, before, after)
    torch.testing.assert_close(bound, (values.abs().amax(0) + shift.abs()).div(scale).view(2, 3))
    assert (bound >= moved.abs().amax(0).view(2, 3) - 1e-6).all()
    # Without a shift the bound is what the values are.
    after = {fold.weight: weight / scale[:, None], fold.bias: bias / scale}
    exact = moved_values(values.abs().amax(0).view(2, 3), fold, before, after)
    torch.testing.assert_close(exact, (values / scale).abs().amax(0).view(2, 3))


def test_keys_and_other_folds_leave_the_scales_alone():
    cache = CachePlan("b.attn", (1,))
    stats = BlockStats(key_abs_max=torch.full((2, 3), 4.48), value_abs_max=torch.full((2, 3), 2.24))
    elsewhere = InputGroup("b.mlp.down", (), Fold("linear", "b.mlp.up.weight", None, tuple(range(6))))
    norm = InputGroup("b.attn.q", (), Fold("norm", "b.norm.weight", None, tuple(range(6))))
    found = cache_tensors(cache, CacheScheme(), stats, [elsewhere, norm], {}, {}, torch.float32)
    torch.testing.assert_close(found, {"b.attn.k_scale": torch.tensor([0.01]), "b.attn.v_scale": torch.tensor([0.005])})
    with pytest.raises(StatsError, match="nothing of the keys and values"):
        cache_tensors(cache, CacheScheme(), None, [], {}, {}, torch.float32)
    with pytest.raises(StatsError, match="do not hold `value_abs_max`"):
        cache_tensors(cache, CacheScheme(), replace(stats, value_abs_max=None), [], {}, {}, torch.float32)
    with pytest.raises(StatsError, match=r"planned as \[3, 1, 1\], but attention has 2"):
        cache_tensors(replace(cache, shape=(3, 1, 1)), PER_HEAD, stats, [], {}, {}, torch.float32)


# Whole models.


@pytest.mark.parametrize("per", ["tensor", "head"])
def test_the_written_scales_are_those_of_transformers_own_cache(per, model, tmp_path):
    from outlierq.pipeline.block.stats_run import token_set

    plan = plan_of(model, "kv-fp8", f"kv_cache.per={per}")
    quantize(plan, tmp_path / "out")
    ids = token_set(plan.model, plan.recipe.calibration).ids
    found, source = tensors_of(tmp_path / "out"), tensors_of(model)
    for block, pair in enumerate(keys_and_values(model, ids)):
        for name, tensor in zip(("k_scale", "v_scale"), pair, strict=True):
            expected = tensor.abs().amax((0, 2, 3)) / 448
            expected = expected.view(2, 1, 1) if per == "head" else expected.amax().reshape(1)
            torch.testing.assert_close(
                found.pop(f"model.layers.{block}.self_attn.{name}"), expected, rtol=1e-4, atol=1e-7
            )
    assert found.keys() == source.keys() and all(torch.equal(found[name], source[name]) for name in found)


@rounded_cache
@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("kv-fp8", ()),
        ("kv-fp8", ("kv_cache.per=head",)),
        ("w8a8-static", ("kv_cache={}",)),
        ("gptq-w4", ("kv_cache.per=head", "quantize.group_size=32")),
    ],
)
def test_our_model_computes_what_transformers_computes(recipe, settings, model, tmp_path):
    out = tmp_path / "out"
    plan = plan_of(model, recipe, *settings)
    report = quantize(plan, out)
    written = sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json")
    assert plan.output_bytes == report.output_bytes == written
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    ours = load_model(open_checkpoint(str(out)))
    assert distance(logits_of(ours), logits_of(theirs)) < 1e-5
    (out / "outlierq.json").unlink()  # its record would refuse the files that are changed now
    generated = theirs.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > IDS.shape[1]
    # Without its scheme in the config the same checkpoint computes something else: the cache is rounded.
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    assert distance(logits_of(without_cache(out, config)), logits_of(ours)) > 1e-3


def without_cache(folder: Path, config: dict) -> torch.nn.Module:
    """The model of the same files with another config."""
    from safetensors.torch import save_file

    kept = {name: tensor for name, tensor in tensors_of(folder).items() if not name.endswith((".k_scale", ".v_scale"))}
    groups = config["quantization_config"]["config_groups"]
    if not groups:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return load_model(open_checkpoint(str(folder)))


def test_a_folder_of_statistics_gives_the_same_scales_without_a_run(model, tmp_path):
    from outlierq.pipeline.calibrate import calibrate

    plan = plan_of(model, "kv-fp8")
    quantize(plan, tmp_path / "run")
    calibrate(plan.checkpoint, plan.recipe.calibration, tmp_path / "stats")
    quantize(plan_of(model, "kv-fp8"), tmp_path / "read", stats=tmp_path / "stats")
    run, read = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "read")
    assert run.keys() == read.keys() and all(torch.equal(run[name], read[name]) for name in run)


def test_eager_attention_is_rounded_too(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantize(plan_of(model, "kv-fp8"), out)
    expected = logits_of(load_model(open_checkpoint(str(out))))
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_sdpa", False)
    ours = load_model(open_checkpoint(str(out)))
    assert ours.config._attn_implementation == "outlierq_fp8_cache_eager"
    torch.testing.assert_close(logits_of(ours), expected, rtol=1e-4, atol=1e-5)


def test_scales_that_fit_no_attention_are_named(model, tmp_path):
    out = tmp_path / "out"
    quantize(plan_of(model, "kv-fp8"), out)
    from safetensors.torch import save_file

    (out / "outlierq.json").unlink()  # its record would refuse the files that are changed now
    tensors = tensors_of(out)
    moved = {name.replace("layers.1.self_attn.k_s", "layers.7.self_attn.k_s"): t for name, t in tensors.items()}
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"no model\.layers\.7\.self_attn\.v_scale"):
        load_model(open_checkpoint(str(out)))
    moved = {name.replace("layers.1.self_attn.", "layers.7.self_attn."): t for name, t in tensors.items()}
    moved |= {name: t for name, t in tensors.items() if not name.endswith("_scale")}
    save_file({n: t for n, t in moved.items() if "7" not in n or n.endswith("_scale")}, out / "model.safetensors")
    with pytest.raises(SourceError, match=r"cache scales for model\.layers\.7\.self_attn"):
        load_model(open_checkpoint(str(out)))


# What cannot be.


def test_models_without_the_interface_and_blocks_with_two_attentions_are_refused(model, monkeypatch):
    from outlierq import load as load_stage

    monkeypatch.setattr(load_stage, "attention_names", lambda module: [], raising=False)
    with pytest.raises(RecipeError, match="no block of LlamaForCausalLM calls transformers' attention interface"):
        plan_of(model, "kv-fp8")
    monkeypatch.setattr(load_stage, "attention_names", lambda module: ["self", "cross"], raising=False)
    with pytest.raises(RecipeError, match=r"has 2 attention modules \(self, cross\)"):
        plan_of(model, "kv-fp8")


def test_blocks_without_attention_are_said(model, monkeypatch):
    from outlierq import load as load_stage

    answers = iter([["self_attn"], []])
    monkeypatch.setattr(load_stage, "attention_names", lambda module: next(answers), raising=False)
    plan = plan_of(model, "kv-fp8")
    assert plan.notes == ["kv_cache: 1 blocks have no attention, and get no scales"]
    assert list(plan.caches) == [0]


def test_a_cache_needs_calibration_and_a_format_that_has_it():
    with pytest.raises(RecipeError, match="the methods need key_abs_max, value_abs_max"):
        parse("kv_cache: {}\n")
    with pytest.raises(RecipeError, match="dense holds no scales of a KV cache"):
        parse("kv_cache: {}\ncalibration: {}\nexport: {format: dense}\n")
    with pytest.raises(RecipeError, match=r"kv_cache\.per: Input should be 'tensor' or 'head'"):
        parse("kv_cache: {per: channel}\ncalibration: {}\n")


def test_the_plan_says_how_a_server_uses_the_scales(model):
    said = "\n".join(plan_of(model, "kv-fp8").clients)
    assert "--kv-cache-dtype fp8" in said and "k_scale of exactly 1.0" in said
    assert "Flash-Attention" in "\n".join(plan_of(model, "kv-fp8", "kv_cache.per=head").clients)


def test_the_config_says_which_cache(model):
    plan = plan_of(model, "kv-fp8", "kv_cache.per=head")
    found = SimpleNamespace(**json.loads(plan.small_files["config.json"])["quantization_config"])
    assert found.quant_method == "compressed-tensors" and found.config_groups == {}
    scheme = found.kv_cache_scheme
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"]) == (8, "float", "attn_head")
    assert scheme["symmetric"] is True and scheme["dynamic"] is False


def test_a_served_cache_is_rounded_by_token_and_head():
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] *= 100
    lost = {name: ((served_rounding(name)(x) - x).square().mean() / x.square().mean()).item() for name in SERVED_CACHES}
    assert lost["int8"] < lost["fp8"] / 5 < lost["fp8"] < lost["nvfp4"] < lost["int4"] < 0.02
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(served_rounding("int8")(x), (x / scale).round() * scale)
    alone = served_rounding("int4")(x[1])
    assert torch.equal(served_rounding("int4")(x)[1], alone)
    assert served_rounding("int4")(x.bfloat16()).dtype == torch.bfloat16


def test_a_model_is_measured_as_a_server_keeps_its_cache(model):
    def measured(numbers: str) -> outlierq.Evaluation:
        return outlierq.evaluate(
            model, model, windows=1, window_length=64, kv_cache=numbers, cached=False, device="cpu"
        )

    int8, int4 = measured("int8"), measured("int4")
    assert 0 < int8.kl < int4.kl and int8["kv_cache"] == "int8"
    with pytest.raises(ArgumentError, match="choose fp8, int8, int4, nvfp4, kivi-4"):
        measured("int3")
    with pytest.raises(ArgumentError, match="has its own cache"):
        outlierq.evaluate(model, kv_cache="int8", backend="llama.cpp")
