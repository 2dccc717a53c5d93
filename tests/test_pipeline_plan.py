"""The plan knows from headers alone what comes out, to the byte, and what cannot follow the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlierq.core.errors import RecipeError
from outlierq.core.model import DerivedCheckpoint
from outlierq.load import open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import load
from outlierq.recipe.patterns import matches

OVERRIDES = "quantize.overrides=[{match: '*mlp*', bits: 8, group_size: channel}, {match: '*layers.1.*', keep: true}]"


class Unreadable(DerivedCheckpoint):
    """A checkpoint of which only headers can be had."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.config, self.tensors = checkpoint.config, checkpoint.tensors

    def read(self, name):
        raise AssertionError("the plan reads weights")


def plan_of(source: Path, recipe: str, *settings: str, unreadable: bool = False) -> Plan:
    checkpoint = open_checkpoint(str(source))
    return make_plan(Unreadable(checkpoint) if unreadable else checkpoint, load(recipe, list(settings)))


@pytest.mark.parametrize(
    ("model", "recipe", "settings"),
    [
        ("tiny_llama", "rtn-w4", ["quantize.symmetric=false"]),
        ("untied_llama", "rtn-w4", ["quantize.symmetric=false", "quantize.bits=3"]),
        ("untied_llama", "rtn-w4", ["quantize.bits=3", "quantize.ignore=[]", "quantize.symmetric=false"]),
        ("tiny_llama", "rtn-w4", ["quantize.when_indivisible=smaller-group", "quantize.bits=5"]),
        ("tiny_llama", "rtn-w4", ["quantize.when_indivisible=per-channel", "quantize.bits=7"]),
        ("tiny_llama", "rtn-w4", ["quantize.when_indivisible=keep", "quantize.group_size=64"]),
        ("untied_llama", "rtn-w4", [OVERRIDES]),
        ("untied_llama", "rtn-w4", ["export.max_shard_size=20KB"]),
        ("tiny_llama", "rtn-w8", ["export.max_shard_size=1000"]),
        ("tiny_llama", "rtn-w4", ["export.format=dense", "export.max_shard_size=64KiB"]),
        ("untied_llama", "dense", ["export.max_shard_size=0.05MB"]),
    ],
)
def test_the_planned_size_is_the_written_size_to_the_byte(model, recipe, settings, request, tmp_path):
    source, out = request.getfixturevalue(model), tmp_path / "out"
    plan = plan_of(source, recipe, *settings)
    report = quantize(plan, out)
    written = {path.name: path.stat().st_size for path in out.iterdir()}
    assert plan.output_bytes == report.output_bytes == sum(written.values()) - written["outlierq.json"]
    assert plan.layout.sizes == {name: size for name, size in written.items() if name.endswith(".safetensors")}
    assert plan.bits_per_weight == report.bits_per_weight


@pytest.mark.parametrize("recipe", ["rtn-w4", "awq-gptq-w4", "dense"])
def test_the_plan_reads_no_weights(recipe, tiny_llama):
    assert plan_of(tiny_llama, recipe, unreadable=True).output_bytes > 0


def test_widths_that_the_group_does_not_divide_follow_the_policy(tiny_llama):
    def down_proj(policy: str, group: int):
        plan = plan_of(tiny_llama, "rtn-w4", f"quantize.when_indivisible={policy}", f"quantize.group_size={group}")
        return next(p for p in plan.sites if p.site.module.endswith("layers.0.mlp.down_proj")), plan

    planned, plan = down_proj("smaller-group", 64)
    assert planned.scheme.group_size == 32
    assert plan.notes == [
        "model.layers.0.mlp.down_proj and 1 more: group 32: 96 columns are not a multiple of group_size 64"
    ]
    planned, _ = down_proj("smaller-group", 20)
    assert planned.scheme.group_size is None and planned.reason.startswith("per channel: 96 columns")
    planned, _ = down_proj("per-channel", 64)
    assert planned.scheme.group_size is None
    planned, plan = down_proj("keep", 64)
    assert planned.scheme is None and planned.reason.startswith("kept in 16 bits: 96 columns")
    assert plan.notes[0].startswith("only 80% of the weights") and "kept in 16 bits" in plan.notes[1]
    with pytest.raises(RecipeError, match=r"2 linears cannot follow .* model.layers.0.mlp.down_proj: 96 columns"):
        down_proj("error", 64)


def test_a_recipe_that_would_change_nothing_is_refused(tiny_llama):
    with pytest.raises(RecipeError, match="quantizes none of the 14 linears"):
        plan_of(tiny_llama, "rtn-w4", "quantize.ignore=['*']")


def test_later_overrides_win_and_ignored_linears_stay(tiny_llama):
    plan = plan_of(tiny_llama, "rtn-w4", OVERRIDES)
    schemes = {p.site.module: p.scheme for p in plan.sites}
    assert schemes["model.layers.0.mlp.up_proj"].bits == 8
    assert schemes["model.layers.1.mlp.up_proj"] is None and schemes["model.layers.1.self_attn.q_proj"] is None
    assert schemes["model.layers.0.self_attn.q_proj"].bits == 4


def test_an_override_that_matches_nothing_is_said(tiny_llama):
    plan = plan_of(tiny_llama, "rtn-w4", "quantize.overrides=[{match: '*.ffn.*', bits: 8}]")
    assert any("*.ffn.*" in note and "matches no linear" in note for note in plan.notes)


def patterns_noted(plan) -> list[str]:
    return [note for note in plan.notes if "matches no linear" in note or "changes nothing" in note]


@pytest.mark.parametrize("pattern", ["*.ffn.*", "re:.*ffn", "down_proj"])
def test_an_ignore_pattern_that_matches_nothing_is_said(tiny_llama, pattern):
    plan = plan_of(tiny_llama, "rtn-w4", f"quantize.ignore=['*up_proj', '{pattern}']")
    assert patterns_noted(plan) == [f"the ignore {pattern!r} matches no linear"]


@pytest.mark.parametrize("pattern", ["*lm_head", "lm_head", "re:.*lm_head", "re:lm_head$"])
def test_a_pattern_for_a_head_that_is_tied_is_not_said(tiny_llama, untied_llama, pattern):
    for model in (tiny_llama, untied_llama):
        plan = plan_of(model, "rtn-w4", f"quantize.ignore=['{pattern}']")
        assert patterns_noted(plan) == [] and not any("lm_head" in p.site.module for p in plan.sites if p.scheme)


def test_expressions_as_llm_compressor_writes_them_work(tiny_llama):
    pattern = "re:.*layers.0.*(k|v)_proj"
    override = f"quantize.overrides=[{{match: '{pattern}', bits: 8}}]"
    plan = plan_of(tiny_llama, "rtn-w4", "quantize.ignore=['re:.*down_proj$']", override)
    schemes = {p.site.module: p.scheme for p in plan.sites}
    assert schemes["model.layers.0.mlp.down_proj"] is None and schemes["model.layers.0.self_attn.k_proj"].bits == 8
    assert schemes["model.layers.1.self_attn.k_proj"].bits == 4 and patterns_noted(plan) == []
    read = [note for note in plan.notes if "as a glob it matches nothing" in note]
    # The other one says how all names end that it fits.
    assert read == [f"the override {pattern!r} is a regular expression for 2 linears; as a glob it matches nothing"]


@pytest.mark.parametrize(
    "pattern", ["layers.1.*(q|k)_proj$", "layers.1|.*down_proj$", "layers.1", r"layers\.\d+.*down_proj$"]
)
def test_an_expression_that_may_fit_more_than_it_seems_to_is_said_with_its_count(tiny_llama, pattern):
    pattern = f"re:model.{pattern}"
    plan = plan_of(tiny_llama, "rtn-w4", f"quantize.ignore=['{pattern}']")
    fitting = sum(matches(p.site.module, pattern) for p in plan.sites)
    assert (
        f"the ignore {pattern!r} is a regular expression for {fitting} linears; as a glob it matches nothing"
        in plan.notes
    )


def test_expressions_that_name_what_they_fit_are_not_said(tiny_llama):
    patterns = [r"re:model\.layers\.(0|1)\.mlp\.(up|down)_proj$", "re:.*q_proj$"]
    plan = plan_of(tiny_llama, "rtn-w4", f"quantize.ignore={patterns}")
    assert not any("regular expression" in note for note in plan.notes)


def test_an_override_of_what_is_ignored_is_said(untied_llama):
    plan = plan_of(untied_llama, "rtn-w4", "quantize.overrides=[{match: '*lm_head', bits: 8}]")
    assert patterns_noted(plan) == [
        "the override '*lm_head' changes nothing: quantize.ignore keeps all that it matches"
    ]


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        (["quantize.ignore=['*up_proj']"], None),
        (["quantize.ignore=['*up_proj']", "quantize.overrides=[{match: '*', bits: 8}]"], None),
        (["quantize.ignore=['*up_proj']", "quantize.overrides=[{match: '*lm_head', bits: 8}]"], 8),
        (["quantize.ignore=[]"], 4),
    ],
)
def test_the_head_is_quantized_only_when_named(untied_llama, settings, bits):
    plan = plan_of(untied_llama, "rtn-w4", *settings)
    (head,) = [p for p in plan.sites if p.site.module == "lm_head"]
    assert (head.scheme and head.scheme.bits) == bits
    assert any(note.startswith("lm_head: kept in 16 bits: the output head") for note in plan.notes) == (bits is None)


def test_tied_embeddings_are_stored_once(tiny_llama, untied_llama):
    assert "lm_head.weight" not in plan_of(tiny_llama, "rtn-w4").layout.places
    assert "lm_head.weight" in plan_of(untied_llama, "rtn-w4").layout.places
