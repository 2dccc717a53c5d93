"""`outlierq fit`: within its budget and equal to its plan to the byte, loadable by its client, the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import folder_hashes

import outlierq as public
from outlierq.core.errors import ArgumentError
from outlierq.load import open_checkpoint
from outlierq.pipeline.fitting.fit import Goal
from outlierq.pipeline.fitting.goal import cache_size
from outlierq.pipeline.fitting.space import predicted, space_of
from outlierq.pipeline.fitting.storage import CLIENTS, catalogue, keys_of
from outlierq.recipe import given

FEW = {"numbers": ["int4", "int8"], "device": "cpu"}  # quick: few schemes to round to


@pytest.fixture(scope="module")
def stats(tiny_llama, tmp_path_factory) -> Path:
    """Statistics of the tiny model. Read-only."""
    folder = tmp_path_factory.mktemp("stats") / "stats"
    public.calibrate(tiny_llama, out=folder, samples=4, sequence_length=32, device="cpu")
    return folder


def files_bytes(folder: Path) -> int:
    """Bytes of a result without its report."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "outlierq.json")


def test_the_result_has_the_planned_size_to_the_byte_and_keeps_the_budget(tiny_llama, stats, tmp_path):
    limit = 130_000
    fitted = public.fit(tiny_llama, stats=stats, size=limit, out=tmp_path / "out", **FEW)
    assert files_bytes(tmp_path / "out") == fitted.plan.output_bytes <= limit
    assert limit - fitted.plan.output_bytes < 4000, (
        "the budget is used; a further scheme takes about as much in the config"
    )
    assert public.verify(tmp_path / "out", tiny_llama).sound


def test_the_same_command_gives_the_same_bytes_and_the_printed_recipe_does_the_same(tiny_llama, stats, tmp_path):
    texts = []
    for name in ("one", "two"):
        fitted = public.fit(tiny_llama, stats=stats, bits=5.5, out=tmp_path / name, **FEW)
        texts.append(fitted.text)
    assert texts[0] == texts[1]
    (tmp_path / "fitted.yaml").write_text(texts[0])
    public.quantize(tiny_llama, tmp_path / "fitted.yaml", out=tmp_path / "three", stats=stats, device="cpu")
    hashes = [folder_hashes(tmp_path / name) for name in ("one", "two", "three")]
    assert all(
        {name: digest for name, digest in each.items() if name != "outlierq.json"}
        == {name: digest for name, digest in hashes[0].items() if name != "outlierq.json"}
        for each in hashes
    )


@pytest.mark.parametrize("bits", [4.5, 5.0, 6.5])
def test_bits_are_of_the_linears_with_their_scales(tiny_llama, stats, bits):
    fitted = public.fit(tiny_llama, stats=stats, bits=bits, **FEW)
    sites = fitted.plan.structure.sites
    held = sum(fitted.plan._written_bytes(site, scheme) for site, scheme in fitted.plan.schemes.items())
    kept = [site for site in sites if site.block is not None and site not in fitted.plan.schemes]
    held += sum(2 * site.out_features * site.in_features for site in kept)
    weights = sum(site.out_features * site.in_features for site in sites if site.block is not None)
    assert bits - 0.6 < 8 * held / weights <= bits


def test_more_bits_never_predict_a_larger_loss(tiny_llama, stats):
    losses = [public.fit(tiny_llama, stats=stats, bits=bits, **FEW).loss for bits in (4.4, 5, 6, 8, 12)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("client", ["transformers", "vllm"])
def test_linears_that_a_client_merges_share_a_scheme_and_it_loads_the_mixture(tiny_llama, stats, client):
    fitted = public.fit(tiny_llama, stats=stats, bits=5.7, client=client, **FEW)
    assert len(set(fitted.plan.schemes.values())) > 1, "this is a mixture"
    lines = [line for line in fitted.plan.clients if line.startswith(CLIENTS[client].word)]
    assert any(line.partition(": ")[2].startswith("loads") for line in lines), lines
    by_module = {site.module: fitted.plan.schemes.get(site) for site in fitted.plan.structure.sites}
    if client == "vllm":
        for parent, leaves in (("self_attn", "qkv"), ("mlp", ["gate", "up"])):
            for block in range(2):
                assert len({by_module[f"model.layers.{block}.{parent}.{leaf}_proj"] for leaf in leaves}) == 1


def test_a_gguf_file_for_llama_cpp_keeps_its_budget(tiny_llama, stats, tmp_path):
    fitted = public.fit(tiny_llama, stats=stats, bits=6, client="llama.cpp", out=tmp_path / "g", device="cpu")
    assert [path.name for path in (tmp_path / "g").glob("*.gguf")] == ["model.gguf"]
    assert files_bytes(tmp_path / "g") == fitted.plan.output_bytes


def test_a_card_holds_weights_and_a_cache(tiny_llama, stats):
    config = json.loads((tiny_llama / "config.json").read_text())
    context = 100
    assert cache_size(config, context) == 2 * 2 * 2 * 16 * 2 * context  # blocks, keys and values, heads, size, bytes
    fitted = public.fit(tiny_llama, stats=stats, card="150KiB", context=context, **FEW)
    tensors = sum(place.tensor.nbytes for place in fitted.plan.layout.places.values())
    assert tensors + cache_size(config, context) <= 0.9 * 150 * 1024


def test_the_cache_of_windows_latent_attention_and_linear_attention_is_counted():
    text = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 2}
    full = cache_size(text, 1000)
    assert full == 4 * 2 * 2 * 16 * 2 * 1000
    kinds = ["sliding_attention", "full_attention"] * 2
    assert cache_size(text | {"layer_types": kinds, "sliding_window": 100}, 1000) == full * 2 * 1100 // 4000
    assert (
        cache_size({"text_config": text | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}}, 1000)
        == full // 4
    )
    assert cache_size(text | {"kv_lora_rank": 32, "qk_rope_head_dim": 8}, 10) == 4 * 40 * 2 * 10


def test_a_recipe_of_choices_says_again_what_was_chosen(tiny_llama):
    space = space_of(open_checkpoint(str(tiny_llama)), given("gptq-w4"), "transformers", ["int4", "int8"])
    chosen = [list(layer.choices)[number % len(layer.choices)] for number, layer in enumerate(space.layers)]
    plan = space.planned(chosen)
    for layer, storage in zip(space.layers, chosen, strict=True):
        assert {plan.schemes.get(site) for site in layer.sites} == {storage}


def test_losses_fall_with_bits_and_nothing_is_lost_by_keeping(tiny_llama, stats):
    space = space_of(open_checkpoint(str(tiny_llama)), given("gptq-w4"), "transformers")
    prediction = predicted(space, stats)
    for layer, losses in zip(space.layers, prediction.losses, strict=True):
        assert losses.keys() <= layer.choices.keys() and losses[None] == 0
        integers: dict[int, float] = {}
        for scheme, loss in losses.items():
            if scheme is not None and scheme.kind == "int":
                integers[scheme.bits] = min(loss, integers.get(scheme.bits, loss))
        assert len(integers) >= 4, "of most numbers of bits some scheme is worth looking at"
        ordered = [integers[bits] for bits in sorted(integers)]
        assert ordered == sorted(ordered, reverse=True) and ordered[-1] > 0


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_every_scheme_of_the_catalogue_is_asked_for_by_its_keys(format):
    from outlierq.export import format_type
    from outlierq.pipeline.fitting.storage import asking

    schemes = catalogue(format_type(format))
    assert len(schemes) == len(set(schemes)) > 15
    for base, scheme in ((base, scheme) for base in ("gptq-w4", "gguf-q4_k_m") for scheme in schemes):
        asked = asking(given(base), scheme).scheme_for("model.layers.0.mlp.up_proj", scheme.scale_dtype)
        assert asked == scheme, keys_of(scheme)


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal(), "there is no goal"),
        (Goal(size="1GB", bits=4.0), "--size and --bits are several goals"),
        (Goal(card="24GiB"), "--card needs --context"),
        (Goal(bits=4.0, context=5), "--context needs --card"),
    ],
)
def test_goals_that_are_none_or_contradict_are_refused(goal, said):
    with pytest.raises(ArgumentError, match=said):
        goal.check()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"size": "1kB"}, r"1,000 bytes are too few: the checkpoint takes [\d,]+ bytes at the least"),
        ({"size": "1GB"}, r"are enough for the model as it is: the checkpoint takes [\d,]+ bytes unquantized"),
        ({"bits": 1.5}, r"1\.5 bits are too few: a weight of the linears takes [\d.]+ bits at the least"),
        ({"bits": 17}, "17 bits are enough for the model as it is"),
        ({"card": "1kB", "context": 10}, "bytes of cache for 10 tokens"),
        ({"size": "many"}, "'many' is not a size"),
        ({"bits": 4, "client": "vlm"}, "'vlm' is not a client that is known; did you mean vllm"),
        ({"bits": 4, "numbers": ["int3"], "client": "vllm"}, r"vLLM loads no mixture with int3.*int4, int8"),
        ({"bits": 4, "numbers": ["int44"]}, "'int44' is no kind of numbers in compressed-tensors; did you mean int4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_with_the_nearest_figure_before_statistics_are_read(tiny_llama, tmp_path, words, said):
    with pytest.raises(ArgumentError, match=said):
        public.fit(tiny_llama, stats=tmp_path / "there-are-none", device="cpu", **words)


def test_the_command_prints_the_recipe_and_writes_nothing_without_out(outlierq, tiny_llama, stats, tmp_path):
    answer = outlierq("fit", tiny_llama, "--stats", stats, "--bits", "5", "--numbers", "int4", "--numbers", "int8")
    assert answer.code == 0, answer.err
    recipe = given(yaml.safe_load(answer.out))
    assert recipe.quantize.method == "gptq" and "transformers" in recipe.description
    answer = outlierq("fit", tiny_llama, "--stats", stats, "--bits", "5", "--size", "1MB")
    assert answer.code == 2 and "several goals" in answer.err


def test_the_choices_of_llama_cpp_are_the_types_that_divide_the_widths(tiny_llama):
    space = space_of(open_checkpoint(str(tiny_llama)), given("gptq-w4"), "llama.cpp")
    kinds = {scheme.numbers for layer in space.layers for scheme in layer.choices if scheme}
    assert kinds >= {"Q4_0", "Q8_0", "MXFP4"} and "Q4_K" not in kinds, "its widths are no multiples of 256"


def test_a_mixture_that_no_version_of_the_client_loads_is_refused():
    from outlierq.core.errors import RecipeError
    from outlierq.pipeline.fitting.space import check_loads

    vllm = CLIENTS["vllm"]
    check_loads(vllm, ["vLLM 0.32 (CPU build): does not load it: x", "vLLM 0.33 (GPU): loads", "transformers: loads"])
    with pytest.raises(RecipeError, match="does not load it: two"):
        check_loads(vllm, ["vLLM 0.32: does not load it: one", "vLLM 0.33: does not load it: two", "other: loads"])
    with pytest.raises(RecipeError, match="wrongly"):
        check_loads(CLIENTS["transformers"], ["transformers, experts: reads nvfp4 experts wrongly", "vLLM: loads"])


def test_a_cache_of_eight_bits_leaves_more_of_a_card(tiny_llama, stats):
    kv = {"settings": {"kv_cache.per": "tensor"}}
    losses = [
        public.fit(tiny_llama, stats=stats, card="150KiB", context=150, **FEW, **extra).loss for extra in ({}, kv)
    ]
    assert losses[1] < losses[0]
