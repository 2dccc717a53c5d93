"""What is said of clients is data: every condition is one that exists, and every fact can be met."""

from __future__ import annotations

import pytest

from outlierq.core.scheme import ActivationScheme, CacheScheme, QuantScheme
from outlierq.export.clients import Mixture, _properties, cache_facts, client_facts, expert_facts, table

TOGETHER = {"several", "some_asymmetric", "count", "merged", "read"}
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
        assert all(fact.get("when", {}).keys() <= {"per"} for fact in found)


def test_a_fact_without_conditions_is_the_last_of_its_client():
    for _, clients in [*sections(), ("kv_cache", table()["kv_cache"])]:
        for found in clients.values():
            assert all(fact.get("when") for fact in found[:-1])


@pytest.mark.parametrize(
    ("schemes", "said"),
    [
        ([], "vLLM 0.32: loads"),
        ([QuantScheme(4), QuantScheme(4, 64)], "vLLM 0.32: loads"),
        ([QuantScheme(4), QuantScheme(3)], "vLLM 0.32: has no kernel for 3-bit weights; use 4 or 8 bits"),
        ([QuantScheme(8, None, activations=INT8)], "vLLM 0.32: loads"),
        ([QuantScheme(8, 64, activations=INT8)], "int8 symmetric g64, inputs int8 per token dynamic: not tried"),
        ([BLOCKS], "has no kernel for blocks of 64 x 128"),
        ([FLOAT], "vLLM 0.32: fp8 weights with 16-bit inputs: not tried"),
        ([QuantScheme(4, 64, False), QuantScheme(4)], "does not load 2 schemes of which some are asymmetric"),
        ([QuantScheme(4, 64, False)], "loads (dequantized at load, as its config asks)"),
    ],
)
def test_the_first_fact_that_fits_is_said(schemes, said):
    assert said in "\n".join(client_facts("compressed-tensors", schemes))


MERGED = Mixture("Qwen3MoeForCausalLM", is_merged=True)


def test_experts_that_a_class_takes_in_one_tensor_only_are_said_not_to_load():
    lines = expert_facts([QuantScheme(4, 128)], Mixture("GptOssForCausalLM", is_merged=False))
    assert len(lines) == 2 and all("does not load them" in line for line in lines)
    read = expert_facts([QuantScheme(4, 128)], Mixture("GraniteMoeForCausalLM", is_merged=False))
    assert "does not load them" in read[0] and "its loader takes them" in read[1]


def test_experts_and_the_cache_have_facts_of_their_own():
    assert "of different schemes" in expert_facts([QuantScheme(4), None], MERGED)[0]
    assert "with zero points" in expert_facts([QuantScheme(4, 64, False)], MERGED)[0]
    assert "stay in 16 bits" in expert_facts([QuantScheme(8, None, kind="float", activations=FP8)], MERGED)[0]
    assert "Flash-Attention" in cache_facts(CacheScheme("head"))[0]
    assert "Flash-Attention" not in cache_facts(CacheScheme())[0]
