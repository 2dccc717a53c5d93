"""What is said of clients is data: every condition is one that exists, and every fact can be met."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outlierq.core.model import LinearSite
from outlierq.core.scheme import ActivationScheme, CacheScheme, QuantScheme
from outlierq.export.clients import (
    Mixture,
    _properties,
    as_whole,
    cache_facts,
    client_facts,
    expert_facts,
    table,
    with_class,
    with_layers,
)
from outlierq.pipeline.fitting.sweep import SweepRow

TOGETHER = {"several", "some_asymmetric", "count", "merged", "read", "mixed", "biased"}
FLOAT = QuantScheme(8, None, kind="float")
INT8, FP8 = ActivationScheme(), ActivationScheme("float")
BLOCKS = QuantScheme(8, None, kind="float", block=(64, 128), activations=FP8)


def sections() -> list[tuple[str, dict]]:
    known = table()
    return [*known["formats"].items(), ("experts", known["experts"])]


def test_every_condition_is_a_property_that_schemes_have():
    known = _properties(QuantScheme()).keys() | TOGETHER
    facts = [fact for _, clients in sections() for found in clients.values() for fact in found]
    assert len(facts) > 30
    for fact in facts:
        assert fact.keys() <= {"when", "what"} and fact["what"]
        assert fact.get("when", {}).keys() <= known, fact
    for found in table()["kv_cache"].values():
        assert all(fact.get("when", {}).keys() <= {"per", "numbers"} for fact in found)


def test_a_fact_without_conditions_is_the_last_of_its_client():
    for _, clients in [*sections(), ("kv_cache", table()["kv_cache"])]:
        for found in clients.values():
            assert all(fact.get("when") for fact in found[:-1])


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        ([], "vLLM 0.32 (CPU build): loads"),
        ([QuantScheme(4), QuantScheme(4, 64)], "vLLM 0.32 (CPU build): loads"),
        ([QuantScheme(4), QuantScheme(3)], "vLLM 0.32 (CPU build): has no kernel for 3-bit weights; use 4 bits"),
        ([QuantScheme(8, None, activations=INT8)], "vLLM 0.32 (CPU build): loads"),
        ([QuantScheme(8, 64, activations=INT8)], "int8 symmetric g64, inputs int8 per token dynamic: not tried"),
        ([BLOCKS], "has no kernel for blocks of 64 x 128"),
        ([FLOAT], "vLLM 0.32 (CPU build): fp8 weights with 16-bit inputs: not tried"),
        ([QuantScheme(4, 64, False), QuantScheme(4)], "does not load 2 schemes of which some are asymmetric"),
        ([QuantScheme(4, 64, False)], "loads (dequantized at load, as its config asks)"),
    ],
)
def test_the_first_fact_that_fits_is_said(schemes, said):
    assert said in "\n".join(client_facts("compressed-tensors", schemes))


MERGED = Mixture("Qwen3MoeForCausalLM", is_merged=True)


def test_experts_that_a_class_takes_in_one_tensor_only_are_said_not_to_load():
    lines = expert_facts([QuantScheme(4, 128)], Mixture("GptOssForCausalLM", is_merged=False))
    assert len(lines) == 3 and all("does not load them" in line for line in lines)
    read = expert_facts([QuantScheme(4, 128)], Mixture("GraniteMoeForCausalLM", is_merged=False))
    assert "does not load them" in read[0] and "its loader takes them" in read[1] and "not tried" in read[2]


def test_a_client_that_loads_all_but_the_experts_is_not_said_to_load():
    said = ["transformers 5.23 with compressed-tensors 0.20: loads", "vLLM 0.33: loads", "vLLM 0.32: loads (slowly)"]
    experts = ["transformers 5.23, experts: does not load them", "vLLM 0.33, experts: not tried"]
    assert as_whole(said + experts) == ["vLLM 0.32: loads (slowly)", *experts]
    loaded = ["transformers 5.23, experts: loads (decoded)"]
    assert as_whole(said + loaded) == said + loaded
    fault = ["vLLM 0.33: does not load 3 bits", "vLLM 0.33, experts: not tried"]
    assert as_whole(fault) == fault
    assert SweepRow("gptq-w4", "", clients=as_whole(said + experts)).loads_in == "vLLM 0.32"
    assert SweepRow("gptq-w4", "", clients=[*said, *loaded]).loads_in.count("transformers") == 1


def test_experts_of_a_block_that_differ_and_experts_with_biases_are_told():
    mixed = expert_facts([QuantScheme(4, 64), QuantScheme(4, 32)], replace(MERGED, is_mixed=True))
    assert all("does not load experts" in line for line in mixed)
    apart = expert_facts([QuantScheme(4, 64), QuantScheme(4, 32)], MERGED)  # each block has one scheme
    assert "does not load" in apart[0] and all(": loads" in line for line in apart[1:])
    biased = expert_facts([QuantScheme(4, 64)], replace(MERGED, is_biased=True))
    assert "with biases: not tried" in biased[1] and "does not load biases" in biased[2]


LINE = ["transformers 5.23: loads", "vLLM 0.32 (CPU build): loads", "vLLM 0.33 (GPU, as documented): loads"]


def linears(columns: int, **rows: int) -> list[LinearSite]:
    """Linears of one parent by name, with so many rows."""
    return [LinearSite(f"a.{name}", f"a.{name}.weight", None, out, columns, 0) for name, out in rows.items()]


@pytest.mark.parametrize(
    ("sites", "schemes", "cpu", "gpu"),
    [
        (linears(64, q_proj=64, k_proj=32, v_proj=32), [4, 4, 4], "loads", "loads"),
        (linears(64, q_proj=64, k_proj=32), [4, 8], "must share one scheme", "must share one scheme"),
        (linears(64, q_a_proj=64, kv_a_proj_with_mqa=32), [4, None], "must share one scheme", "must share one scheme"),
        (linears(64, in_proj_qkv=64, in_proj_z=32), [4, 8], "must share one scheme", "must share one scheme"),
        (linears(64, k_proj=32, v_proj=32), [4, 8], "must share one scheme", "must share one scheme"),
        (linears(64, in_proj_b=4, in_proj_a=4), [4, 4], "have 8 rows, no multiple of 32", "loads"),
        (linears(64, in_proj_b=16, in_proj_a=16), [4, 4], "loads", "loads"),
        (linears(72, down_proj=64), [4], "has 72 columns, no multiple of 32", "loads"),
        (linears(68, down_proj=64), [4], "no multiple of 8, which fill a word", "no multiple of 8, which fill a word"),
    ],
)
def test_layers_that_a_client_merges_or_has_no_kernel_for_are_told(sites, schemes, cpu, gpu):
    of = {site: bits and QuantScheme(bits, None) for site, bits in zip(sites, schemes, strict=True)}
    transformers, tried, documented = with_layers(LINE, of)
    assert transformers.endswith(": loads") and cpu in tried and gpu in documented


def test_what_a_client_unpacks_it_cannot_with_quantized_inputs():
    [site] = linears(64, kv_b_proj=64)
    _, tried, documented = with_layers(LINE, {site: QuantScheme(8, None, activations=INT8)})
    assert "it unpacks a.kv_b_proj" in tried and "ignore '*.kv_b_proj'" in tried and documented == LINE[2]
    assert with_layers(LINE, {site: QuantScheme(4, 32)}) == LINE


def test_a_class_that_was_not_tried_or_that_a_client_has_not_is_told():
    assert with_class(LINE, "LlamaForCausalLM") == LINE
    untried = with_class(LINE, "OlmoForCausalLM")
    assert untried[1].endswith("loads; OlmoForCausalLM was not tried") and untried[2] == LINE[2]
    unknown = with_class(LINE, "NobodyForCausalLM")
    assert unknown[0] == LINE[0] and all("not tried: it has no class NobodyForCausalLM" in line for line in unknown[1:])


def test_experts_and_the_cache_have_facts_of_their_own():
    assert "of different schemes" in expert_facts([QuantScheme(4), None], MERGED)[0]
    assert "with zero points" in expert_facts([QuantScheme(4, 64, False)], MERGED)[0]
    assert "stay in 16 bits" in expert_facts([QuantScheme(8, None, kind="float", activations=FP8)], MERGED)[0]
    assert "Flash-Attention" in cache_facts(CacheScheme("head"))[0]
    assert "Flash-Attention" not in cache_facts(CacheScheme())[0]
