"""Keys of even size never change what a model computes; the recipe for such a cache says what a server is told."""

from __future__ import annotations

import json

import pytest
import torch
from test_rotate import ARCHITECTURES, LLAMA, difference, logits, proved, save

import outlierq as package
from outlierq.core.errors import StatsError
from outlierq.load import load_model, open_checkpoint, round_served_cache
from outlierq.load.model.attention import served_rounding
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.remodel.keys import find_keys, pairings
from outlierq.pipeline.remodel.rewrite import rewritten
from outlierq.pipeline.studying.caches import SERVED, CacheRow, advice, loud_layers
from outlierq.recipe import load, parse

EVEN = parse("transform: [even_keys]\nexport: {format: dense}")
FUSED = ("phi3, fused", "gpt2", "gpt-neox", "bloom")
NORMED = ("qwen3, norms of queries and keys", "gemma3")


@pytest.mark.parametrize(
    "name", ["llama, grouped heads", "qwen2, biases", "gemma, 1 + w", "opt", *FUSED[:1], *NORMED[:1]]
)
def test_logits_stay_and_keys_that_do_not_allow_it_are_left_with_a_note(name, tmp_path):
    config_class, arguments, _ = ARCHITECTURES[name]
    original = save(tmp_path, config_class, arguments)
    checkpoint = rewritten(open_checkpoint(str(tmp_path)), EVEN)
    assert difference(logits(load_model(checkpoint)), logits(original)) <= 1e-5
    left = name in FUSED or name in NORMED
    said = "keys are left as they are: no two linears" if left else "even_keys: keys of 2 blocks"
    assert said in "\n".join(checkpoint.notes)
    changed = set(checkpoint.rewrite.changes)
    assert {n.rpartition("self_attn.")[2].partition(".")[0] for n in changed} == (
        set() if left else {"q_proj", "k_proj"}
    )
    if not left:
        assert proved(checkpoint) <= 1e-4
        for n in changed:  # powers of two, row by row
            ratio = checkpoint.read(n).float() / checkpoint.original.read(n).float()
            assert torch.equal(torch.frexp(ratio).mantissa, torch.full_like(ratio, 0.5))


def test_a_loud_channel_of_keys_no_longer_takes_the_precision_of_the_others(tmp_path):
    model = save(tmp_path, "LlamaConfig", {**LLAMA, "max_position_embeddings": 64})
    for block in model.model.layers:
        block.self_attn.k_proj.weight.data[[3, 17]] *= 30
    model.save_pretrained(tmp_path)

    def lost(checkpoint) -> float:
        plain = logits(load_model(checkpoint))
        rounded = load_model(checkpoint)
        noise = round_served_cache(rounded, "int8")
        y = logits(rounded)
        assert sorted(noise) == [0, 1] and all(0 < value < 1 for value in noise.values())
        return difference(y, plain)

    stored = open_checkpoint(str(tmp_path))
    assert lost(rewritten(stored, EVEN)) < 0.7 * lost(stored)


def test_sizes_that_calibration_saw_decide_the_scales(tmp_path, tiny_llama):
    settings = {"samples": 4, "sequence_length": 32}
    package.calibrate(tiny_llama, out=tmp_path / "stats", **settings, device="cpu")
    stored = open_checkpoint(str(tiny_llama))
    even = parse(f"transform: [{{method: even_keys, stats_folder: {tmp_path / 'stats'}}}]\nexport: {{format: dense}}")
    checkpoint = rewritten(stored, even)
    assert "even_keys: keys of 2 blocks, by calibration" in checkpoint.notes
    assert proved(checkpoint) <= 1e-4
    first = find_keys(stored, str(tmp_path / "stats")).keys[0]
    assert len(first.sizes) == len(first.shared)
    loud = max(range(len(first.sizes)), key=first.sizes.__getitem__)
    name = "model.layers.0.self_attn.k_proj.weight"
    ratio = (checkpoint.read(name).float() / stored.read(name).float()).mean(1)
    assert ratio[loud] == ratio.view(first.heads, -1)[loud * first.heads // len(first.shared)].min() <= 1
    save(tmp_path / "other", "LlamaConfig", LLAMA)
    with pytest.raises(StatsError):
        rewritten(open_checkpoint(str(tmp_path / "other")), even)


def test_two_channels_of_a_pair_share_a_scale_in_every_pairing():
    ways = list(pairings(8))
    assert ways[0] == list(range(8)) and [0, 1, 2, 3, 0, 1, 2, 3] in ways and [0, 0, 1, 1, 2, 2, 3, 3] in ways
    assert [0, 1, 0, 1, 2, 3, 4, 5] in ways  # half of a head is rotated
    assert all(len(way) == 8 and set(way) == set(range(max(way) + 1)) for way in ways)


def test_the_scales_of_a_path_are_those_of_its_heads(tmp_path):
    save(tmp_path, "LlamaConfig", LLAMA)
    first = find_keys(open_checkpoint(str(tmp_path))).keys[0]
    assert first.heads == 2 and len(first.shared) == 24 and len(first.queries) == 48
    assert first.shared[0] == first.shared[6] != first.shared[1]  # halves of 12 channels
    assert first.gain == "model.layers.0.input_layernorm.weight" and not first.offset


@pytest.mark.parametrize("numbers", ["int8", "int4", "nvfp4"])
def test_the_recipe_writes_no_scales_and_says_the_flag(numbers, tiny_llama, tmp_path):
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("kv-int8", [f"kv_cache.numbers={numbers}"]))
    said = "\n".join(plan.clients)
    flag = "nvfp4" if numbers == "nvfp4" else f"{numbers}_per_token_head"
    assert f"`--kv-cache-dtype {flag}`" in said and "--kv-cache-dtype-skip-layers" in said
    assert f"eval --kv-cache {numbers}" in said
    assert not plan.caches and "quantization_config" not in json.loads(plan.small_files["config.json"])
    if numbers == "int8":
        quantize(plan, tmp_path / "out")
        out = open_checkpoint(str(tmp_path / "out"))
        assert not [name for name in out.tensors if name.endswith(("k_scale", "v_scale"))]
        assert f"--kv-cache-dtype {flag}" in (tmp_path / "out" / "outlierq.json").read_text()  # so the card
        assert package.verify(tmp_path / "out", tiny_llama).sound


def test_layers_that_are_skipped_stay_in_16_bits(tmp_path):
    model = save(tmp_path, "LlamaConfig", LLAMA)
    plain = logits(model)
    assert round_served_cache(model, "int4", [0, 1]) == {}
    assert torch.equal(logits(model), plain)
    noise = round_served_cache(model, "int4", [1])
    assert not torch.equal(logits(model), plain) and list(noise) == [0]


def test_few_loud_layers_are_named_and_many_are_not():
    assert loud_layers({0: 9.0, 1: 1.0, 2: 1.1, 3: 0.9}) == [0]
    assert loud_layers({0: 9.0, 1: 9.0, 2: 1.0, 3: 1.0, 4: 1.0}) == []
    assert loud_layers({}) == []
    flag = f"{SERVED['int4'][2]} --kv-cache-dtype-skip-layers 0"
    rows = [
        CacheRow("int4", "", 4.5, SERVED["int4"][2], 0.05),
        CacheRow("int4, layers 0 in 16 bits", "", 7, flag, 0.004),
    ]
    assert advice(rows).startswith(flag)
    assert served_rounding("int8")(torch.zeros(1, 1, 2, 16)).abs().sum() == 0
