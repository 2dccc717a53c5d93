"""Methods are found by name, and their keyword-only arguments are their recipe keys."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from typing import Literal, get_args

import pytest

from outlierq import registry
from outlierq.core.errors import MethodError, RecipeError
from outlierq.registry import finding
from outlierq.registry.declaring import REGISTERED

STAGES = registry.STAGES


@pytest.fixture
def own_methods():
    """A registry whose additions are forgotten after the test."""
    registry.methods("quantize")
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


@pytest.mark.parametrize("stage", STAGES)
def test_methods_of_a_stage_come_in_alphabetical_order(stage):
    found = registry.methods(stage)
    assert found
    assert list(found) == sorted(found)
    assert all(m.stage == stage and m.name == name for name, m in found.items())


def test_a_method_is_found_by_its_name():
    assert registry.method("quantize", "gptq").name == "gptq"


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(RecipeError, match="there is no quantize method 'gptqq'; known: ") as raised:
        registry.method("quantize", "gptqq")
    assert raised.value.what.endswith("; known: " + ", ".join(registry.methods("quantize")))
    assert raised.value.hint == "did you mean 'gptq'?"


def test_a_name_like_no_other_gets_the_list_alone():
    with pytest.raises(RecipeError, match=r"known: .*rtn") as raised:
        registry.method("quantize", "zzzzzz")
    assert raised.value.hint is None


def test_a_method_of_one_stage_is_unknown_to_another():
    with pytest.raises(RecipeError, match=r"there is no transform method 'rtn'; known: .*awq"):
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


def test_two_methods_of_one_name_are_refused_and_both_places_are_named(own_methods):
    with pytest.raises(MethodError, match="two quantize methods are called 'rtn': one of outlierq, one of the module "):
        registry.quantizer("rtn", paper="arXiv:0000.00000")(lambda w, stats, scheme: None)


def test_a_name_is_taken_for_every_stage_that_a_section_may_name(own_methods):
    with pytest.raises(MethodError, match="two transform methods are called 'rotate'"):
        registry.transform("rotate", paper="arXiv:0000.00000")(lambda w, stats, scheme, tie: None)
    registry.transform("rtn", paper="arXiv:0000.00000")(lambda w, stats, scheme, tie: None)  # another section
    assert (
        registry.method("quantize", "rtn").stage == "quantize" and registry.transform_method("rtn").stage != "quantize"
    )


def test_what_an_option_needs_and_gives_is_asked_of_its_declaration(own_methods):
    @registry.quantizer(
        "own",
        needs=("mean",),
        needs_if={"search": {"wide": ("hessian",), "narrow": ("abs_max",)}},
        gives_if={"search": {"none": (registry.LARGEST_SCALES,)}},
        paper="arXiv:0000.00000",
    )
    def own(w, stats, scheme, *, search: Literal["none", "wide", "narrow"] = "none"):
        """Do it well."""

    chosen = registry.method("quantize", "own")
    assert chosen.needs_with({}) == {"mean"} and chosen.needs_with({"search": "wide"}) == {"mean", "hessian"}
    assert chosen.gives_with({}) == {registry.LARGEST_SCALES} and not chosen.gives_with({"search": "wide"})
    assert "`own`, `search: none`" in registry.ways_to(registry.LARGEST_SCALES)


@pytest.mark.parametrize("stage", STAGES)
def test_declarations_name_options_and_values_that_there_are(stage):
    for chosen in registry.methods(stage).values():
        for name, by_value in (*chosen.needs_if.items(), *chosen.gives_if.items()):
            assert by_value.keys() <= set(get_args(chosen.options[name].annotation))


def test_a_new_method_is_known_to_recipes_at_once(own_methods):
    from outlierq.recipe import parse

    @registry.quantizer("own", paper="arXiv:0000.00000")
    def own(w, stats, scheme, *, strength: float = 0.5):
        """Do it well."""

    assert parse("quantize: {method: own, strength: 2}").quantize.options == {"strength": 2.0}
    with pytest.raises(RecipeError, match="did you mean 'strength'"):
        parse("quantize: {method: own, strenght: 2}")


@pytest.fixture
def added_modules(own_methods, monkeypatch, tmp_path):
    """A function that adds a module to the stage folder `quantize`, to be found by whoever asks for a method."""
    before = list(sys.modules)

    def add(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        finding._import_own.cache_clear()

    stage = import_module("outlierq.quantize")
    monkeypatch.setattr(stage, "__path__", [*stage.__path__, str(tmp_path)])
    yield add
    for name in sys.modules.keys() - before:
        del sys.modules[name]
    finding._import_own.cache_clear()


SIMPLE = """
from outlierq.registry import quantizer

@quantizer({name!r}, paper="none")
def simple(w, stats, scheme):
    return None
"""


def test_a_file_in_a_stage_folder_is_a_method_though_nothing_names_it_and_it_sorts_first(added_modules):
    added_modules("aaa_simple", SIMPLE.format(name="aaa_simple"))
    assert next(iter(registry.methods("quantize"))) == "aaa_simple"
    assert "aaa_simple" not in registry.methods("transform")


def test_a_broken_file_in_a_stage_folder_is_an_error_as_often_as_one_asks(added_modules):
    added_modules("broken_simple", "import no_such_module_at_all")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            registry.methods("quantize")


def test_importing_the_registry_imports_no_method():
    code = "import sys, outlierq.registry; print([m for m in sys.modules if m.startswith('outlierq.quantize')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
