"""Caches of the literature: the laws of each, and that attention sees what they give back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import outlierq as package
from outlierq.core.errors import ArgumentError, SourceError
from outlierq.load import load_model, open_checkpoint
from outlierq.ops.caches import k_sort, kivi, kvquant, rotate_kv
from outlierq.ops.caches.evaluated import EVALUATED, EvaluatedCache
from outlierq.ops.caches.uniform import rounded
from outlierq.pipeline.measuring import evaluated_cache
from outlierq.pipeline.measuring.evaluated_cache import beside_newest, evaluate_through, loud_tokens
from outlierq.pipeline.studying.caches import BEARABLE, CacheRow, advice

IDS = torch.randint(3, 259, (2, 96), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tools) -> Path:
    """Float32, 4 heads and 2 of keys, wide initial weights: attention looks around."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return tools.write_llama(folder, dtype="float32", seed=4, initializer_range=0.2, hidden_size=128)


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(evaluated_cache, "WINDOWS", 2)
    monkeypatch.setattr(evaluated_cache, "LENGTH", 64)


def keys_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lost_db(x: torch.Tensor, y: torch.Tensor) -> float:
    return 10 * torch.log10(x.square().sum() / (y - x).square().sum()).item()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# Each by itself.


@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_even_steps_hold_the_ends_of_every_row_and_clip_them_when_asked(clip):
    x = keys_of(3, 5, 64)
    done = rounded(x, 4, clip)
    step = (x.amax(-1) - x.amin(-1)) * clip / 15
    assert all(len(row.unique()) <= 16 for row in done.flatten(0, 1))
    inside = (done - x).abs() <= step[..., None] / 2 + 1e-6
    assert inside.float().mean() > (0.9 if clip < 1 else 0.99)


def test_kivi_rounds_keys_by_channel_so_that_a_loud_channel_costs_the_others_nothing():
    key = keys_of(1, 2, 64, 32)
    loud = key.clone()
    loud[..., 3] *= 100
    quiet = torch.arange(32) != 3
    assert torch.equal(kivi.keys(loud, 4)[..., quiet], kivi.keys(key, 4)[..., quiet])
    assert lost_db(loud[..., quiet], kivi.values(loud, 4)[..., quiet]) < lost_db(key, kivi.values(key, 4)) - 10
    assert torch.equal(kivi.keys(key[:, :, :40], 4)[:, :, 32:], key[:, :, 32:40]), "tokens that fill no group"


def test_kivi_lets_every_query_see_its_newest_tokens_as_they_are():
    seen = kivi.seen_rounded(300, 128)
    assert not seen[:128].any() and seen[299].sum() == (300 - 128) // 32 * 32
    for query in (127, 160, 299):
        assert not seen[query, max(0, query - 127) :].any()


def test_rotatekv_with_many_bits_gives_back_what_it_got():
    key, value = keys_of(2, 4, 10, 16), keys_of(2, 4, 10, 16, seed=1)
    order = rotate_kv.channel_order(key.transpose(1, 2).flatten(0, 1))
    assert sorted(order.tolist()) == list(range(64))
    assert far(rotate_kv.keys(key, 16, order), key) < 1e-3 and far(rotate_kv.values(value, 16), value) < 1e-3


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 8])
def test_turning_several_heads_keeps_every_inner_product(heads):
    key, query = keys_of(5, heads, 16), keys_of(5, heads, 16, seed=1)
    turned = rotate_kv.turned(key), rotate_kv.turned(query)
    assert torch.allclose((turned[0] * turned[1]).sum(), (key * query).sum(), atol=1e-4)
    assert torch.allclose(rotate_kv.turned(turned[0], back=True), key, atol=1e-5)


def test_rotatekv_spreads_what_one_channel_holds():
    key = keys_of(1, 4, 64, 32)
    key[..., 5] *= 30
    order = rotate_kv.channel_order(key.transpose(1, 2).flatten(0, 1))
    plain = rounded(key.transpose(1, 2).flatten(2), 3).unflatten(2, (4, 32)).transpose(1, 2)
    quiet = torch.arange(32) != 5
    assert lost_db(key[..., quiet], rotate_kv.keys(key, 3, order)[..., quiet]) > lost_db(
        key[..., quiet], plain[..., quiet]
    )


def test_kvquant_learns_ascending_levels_and_keeps_outliers_as_they_are():
    keys, values = keys_of(512, 2, 32), keys_of(512, 2, 32, seed=1)
    levels = kvquant.learned(keys, values, 3)
    assert len(levels.keys) == 8 and (levels.keys.diff() > 0).all() and levels.keys.abs().max() <= 1
    key = keys_of(1, 2, 40, 32, seed=2)
    key[0, 0, 7, 3] = 50.0
    done = kvquant.keys(key, levels)
    assert done[0, 0, 7, 3] == 50 and 14 < lost_db(key, done) < 25
    value = keys_of(1, 8, 40, 32, seed=3)  # one of 100 numbers of a token is apart: wide enough that there is one
    value[0, 1, 4, 0] = -40.0
    assert kvquant.values(value, levels)[0, 1, 4, 0] == -40
    fine = kvquant.learned(keys, values, 8)
    assert lost_db(key, kvquant.keys(key, fine)) > 35


@pytest.mark.parametrize(("block", "expected"), [(32, 17.56), (128, 16.72)])
def test_block_floating_point_loses_on_a_gauss_what_the_sheet_says(block, expected):
    x = keys_of(4000, 128)
    assert lost_db(x, k_sort.block_floating_point(x, block=block)) == pytest.approx(expected, abs=0.1)


def test_block_floating_point_is_exact_for_what_it_holds_and_again():
    x = keys_of(50, 64)
    once = k_sort.block_floating_point(x)
    assert torch.equal(k_sort.block_floating_point(once), once) and not k_sort.block_floating_point(0 * x).any()


def test_blocks_of_channels_of_one_size_lose_less():
    sizes = torch.logspace(-2, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    x = keys_of(2, 3, 50, 64) * sizes
    order = k_sort.channel_order(x.transpose(1, 2).flatten(0, 1))
    quiet = x.abs().mean((0, 1, 2)) < 1
    plain, done = k_sort.block_floating_point(x), k_sort.sorted_blocks(x, order)
    assert lost_db(x[..., quiet], done[..., quiet]) > lost_db(x[..., quiet], plain[..., quiet]) + 3
    assert torch.equal(k_sort.sorted_blocks(x, torch.arange(64).expand(3, -1)), plain)


# In a model.


def _nothing(before_rope: bool, recent: int = 0) -> EvaluatedCache:
    return EvaluatedCache("", lambda k, v, _: (k, v), lambda heads, size: 16.0, before_rope=before_rope, recent=recent)


@pytest.mark.parametrize("cache", [_nothing(True), _nothing(False, recent=32)], ids=["before RoPE", "newest apart"])
def test_a_cache_that_rounds_nothing_changes_nothing(cache, model, monkeypatch):
    monkeypatch.setitem(EVALUATED, "nothing", cache)
    plain, seen = (load_model(open_checkpoint(str(model))) for _ in range(2))
    evaluate_through(seen, "nothing", open_checkpoint(str(model)))
    assert far(logits_of(seen), logits_of(plain)) < 1e-5


def test_keys_before_rope_are_those_that_the_model_projects(model, monkeypatch):
    seen = []

    def note(key, value, _):
        seen.append(key)
        return key, value

    monkeypatch.setitem(EVALUATED, "note", EvaluatedCache("", note, lambda heads, size: 16.0, before_rope=True))
    changed = load_model(open_checkpoint(str(model)))
    projected = []
    changed.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _, __, output: projected.append(output))
    evaluate_through(changed, "note", open_checkpoint(str(model)))
    logits_of(changed)
    assert torch.allclose(seen[0].transpose(1, 2).flatten(2), projected[0], atol=1e-5)


def test_every_query_attends_to_old_tokens_rounded_and_to_new_ones_exact():
    query, key, value = (keys_of(1, 2, 96, 16, seed=seed) for seed in range(3))
    coarse = kivi.keys(key, 2), kivi.values(value, 2)
    module = torch.nn.Module()
    keys, values, mask = beside_newest(module, query, (key, coarse[0]), (value, coarse[1]), None, 32)
    done = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    for place in (0, 31, 70, 95):
        old = (place + 1 - 32) // 32 * 32 if place >= 32 else 0
        both = [
            torch.cat([c[:, :, :old], e[:, :, old : place + 1]], 2) for c, e in zip(coarse, (key, value), strict=True)
        ]
        expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, place : place + 1], *both)
        assert torch.allclose(done[:, :, place : place + 1], expected, atol=1e-5)


def test_windows_that_fit_into_the_newest_tokens_are_not_rounded(model):
    changed = load_model(open_checkpoint(str(model)))
    evaluate_through(changed, "kivi-2", open_checkpoint(str(model)))
    assert far(logits_of(changed), logits_of(load_model(open_checkpoint(str(model))))) < 1e-5


def test_the_tokens_with_the_largest_entries_are_kept():
    hidden = keys_of(2, 10, 8)
    hidden[0, 3, 2], hidden[1, 7, 0] = 90.0, -90.0
    assert loud_tokens(hidden, 1).nonzero().tolist() == [[0, 3], [1, 7]]
    assert loud_tokens(hidden, 500).all()


def test_every_cache_is_measured_and_more_bits_lose_less(model):
    study = package.study_caches(model, windows=2, window_length=192, device="cpu")
    kl = {row.name: row.kl for row in study.rows}
    assert set(kl) == {"fp8", "int8", "int4", "nvfp4", *EVALUATED} and all(value > 0 for value in kl.values())
    assert kl["kivi-4"] < kl["kivi-2"] and kl["rotatekv-4"] < kl["rotatekv-3"] < kl["rotatekv-2"]
    assert kl["kvquant-4"] < kl["kvquant-3"] < kl["kvquant-2"] and kl["int8"] < kl["int4"]
    assert all(2 < row.bits < 9.1 for row in study.rows)
    assert json.loads(json.dumps(study.to_dict()))["advice"] == study.advice


def test_the_command_names_a_flag_and_an_unknown_cache(model, outlierq):
    answer = outlierq("study", "cache", model, "--only", "int8", "--windows", "1", "--window-length", "64")
    assert answer.code == 0 and "vllm serve --kv-cache-dtype int8_per_token_head" in answer.out
    answer = outlierq("study", "cache", model, "--only", "int3")
    assert answer.code != 0 and "kivi-4" in answer.err


def test_the_advice_takes_the_fewest_bits_that_cost_little():
    def row(name: str, bits: float, kl: float) -> CacheRow:
        return CacheRow(name, "", bits, f"flag of {name}", kl)

    rows = [row("fp8", 8.5, 0.002), row("int8", 8.5, 0.001), row("int4", 5.0, BEARABLE / 2), row("nvfp4", 4.5, 1.0)]
    assert advice(rows).startswith("flag of int4") and advice(rows[:2]).startswith("flag of int8")
    assert "keep 16 bits" in advice(rows[3:])


def test_a_model_whose_rope_is_its_own_is_refused_with_caches_that_work(model, monkeypatch):
    import transformers.models.llama.modeling_llama as file

    changed = load_model(open_checkpoint(str(model)))
    evaluate_through(changed, "kvquant-3", open_checkpoint(str(model)))
    monkeypatch.delattr(file, "apply_rotary_pos_emb")
    monkeypatch.setattr(file, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, 2 * k), raising=False)
    with pytest.raises(SourceError, match="before RoPE") as refused:
        logits_of(changed)
    assert "kivi-4" in refused.value.hint


def test_a_model_without_the_attention_interface_is_refused():
    with pytest.raises(SourceError, match="attention interface"):
        evaluate_through(torch.nn.Linear(2, 2), "kivi-4", None)


def test_an_unknown_cache_is_named_before_any_work(model):
    with pytest.raises(ArgumentError, match="known: fp8"):
        package.study_caches(model, only=["kivi-3"], device="cpu")
