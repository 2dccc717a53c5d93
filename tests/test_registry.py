"""Methods are found by name, and their keyword-only arguments are their recipe keys."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

import pytest

from outlierq import registry
from outlierq.core.errors import RecipeError

STAGES = list(registry.METHOD_MODULES)


@pytest.fixture
def own_methods(monkeypatch):
    """A registry whose additions are forgotten after the test."""
    for stage in STAGES:
        registry.methods(stage)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


@pytest.mark.parametrize("stage", STAGES)
def test_methods_of_a_stage_come_in_alphabetical_order(stage):
    found = registry.methods(stage)
    assert found
    assert list(found) == sorted(found)
    assert all(m.stage == stage and m.name == name for name, m in found.items())


def test_a_method_is_found_by_its_name():
    assert registry.method("quantize", "gptq").name == "gptq"


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(
        RecipeError, match="there is no quantize method 'gptqq'; known: gptq, int8_split, rtn"
    ) as raised:
        registry.method("quantize", "gptqq")
    assert raised.value.hint == "did you mean 'gptq'?"


def test_a_name_like_no_other_gets_the_list_alone():
    with pytest.raises(RecipeError, match="known: gptq, int8_split, rtn") as raised:
        registry.method("quantize", "zzzzzz")
    assert raised.value.hint is None


def test_a_method_of_one_stage_is_unknown_to_another():
    with pytest.raises(RecipeError, match="there is no transform method 'rtn'; known: awq"):
        registry.method("transform", "rtn")


def test_options_are_the_keyword_only_arguments_with_their_types_and_defaults(own_methods):
    @registry.quantizer("own", needs=("mean",), paper="arXiv:0000.00000")
    def own(w, stats, scheme, *, strength: float = 0.5, kind: Literal["a", "b"] = "a", rounds: int = 3):
        """Do it well.

        And more.
        """

    chosen = registry.method("quantize", "own")
    assert list(chosen.options) == ["strength", "kind", "rounds"]
    assert chosen.options["strength"].annotation is float
    assert chosen.options["kind"].annotation == Literal["a", "b"]
    assert chosen.options["rounds"].default == 3
    assert chosen.needs == {"mean"}
    assert chosen.summary == "Do it well."


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_every_method_has_a_type_and_a_default(stage):
    for chosen in registry.methods(stage).values():
        for option in chosen.options.values():
            assert option.annotation is not inspect.Parameter.empty
            assert option.default is not inspect.Parameter.empty


@pytest.mark.parametrize("stage", STAGES)
def test_no_option_hides_a_key_of_its_section(stage):
    from outlierq.recipe import Quantize, Transform

    own = {"quantize": Quantize}.get(stage, Transform).model_fields
    for chosen in registry.methods(stage).values():
        assert not chosen.options.keys() & own.keys()


def test_two_methods_of_one_name_are_our_own_mistake(own_methods):
    with pytest.raises(ValueError, match="two quantize methods are called 'rtn'"):
        registry.quantizer("rtn", paper="arXiv:0000.00000")(lambda w, stats, scheme: None)


def test_a_new_method_is_known_to_recipes_at_once(own_methods):
    from outlierq.recipe import parse

    @registry.quantizer("own", paper="arXiv:0000.00000")
    def own(w, stats, scheme, *, strength: float = 0.5):
        """Do it well."""

    assert parse("quantize: {method: own, strength: 2}").quantize.options == {"strength": 2.0}
    with pytest.raises(RecipeError, match="did you mean 'strength'"):
        parse("quantize: {method: own, strenght: 2}")


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_registers_a_method_is_listed(stage):
    decorators = {"quantize": "quantizer", "transform": "transform", "rewrite": "rewriter", "permute": "permuter"}
    decorators["prune"] = "pruner"
    decorator = f"@{decorators[stage]}("
    folder = "quantize" if stage == "quantize" else "transform"
    package = import_module(f"outlierq.{folder}")
    for module in iter_modules(package.__path__, f"outlierq.{folder}."):
        source = inspect.getsource(import_module(module.name))
        registers = decorator in source
        assert registers == (module.name in registry.METHOD_MODULES[stage]), module.name
