"""A recipe is checked as a whole before any work: every fault is named with its line, its key and what to write."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from outlierq import recipe
from outlierq.core.errors import RecipeError
from outlierq.core.gguf.mixes import mixes
from outlierq.core.gguf.types import block_types
from outlierq.core.scheme import QuantScheme
from outlierq.recipe import (
    Calibration,
    Export,
    Override,
    Quantize,
    Recipe,
    TextSource,
    load,
    parse,
    parse_size,
    recipe_yaml,
    shipped,
)

GPTQ = "quantize:\n  method: gptq\ncalibration: {}\n"
RTN = "quantize:\n  method: rtn\n"
FULL = """\
description: everything at once
calibration:
  text:
    - path: embedded
      weight: 2
  samples: 16
transform:
  - method: awq
    grid_points: 10
quantize:
  method: gptq
  bits: 4
  damp: 0.02
  overrides:
    - match: "*v_proj"
      bits: 8
export:
  format: compressed-tensors
"""


def faults(text: str, **more: Any) -> str:
    """The message about a faulty recipe."""
    with pytest.raises(RecipeError) as raised:
        parse(text, **more)
    return raised.value.what


# Shipped recipes.


def test_recipes_are_shipped():
    assert {"rtn-w4", "rtn-w8", "gptq-w4", "awq-w4", "awq-gptq-w4", "dense"} <= recipe.shipped().keys()


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_shipped_recipe_parses_and_says_what_it_is_for(name):
    loaded, text = recipe.load(name), recipe.shipped()[name].read_text(encoding="utf-8")
    assert loaded.name == name
    assert len(loaded.description) > 20
    assert recipe.description(recipe.shipped()[name]) == loaded.description
    assert text.startswith("# ")
    assert yaml.safe_load(text)["export"]["format"] == loaded.export.format


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_bits_in_the_name_of_a_shipped_recipe_are_its_bits(name):
    quantize = recipe.load(name).quantize
    named = re.search(r"\bw(\d)|^(?:auto-|best-)?(?:nv|mx)?fp(\d)|(?<!kv-)int(\d)|q(\d)_", name)
    assert (quantize is None) == (named is None)
    if quantize is not None:
        type = mixes()[quantize.mix]["type"] if quantize.mix else quantize.type
        assert str(block_types()[type].bits if type else quantize.bits) in named.groups()


def test_two_shipped_recipes_never_do_the_same():
    prints = [recipe.load(name).fingerprint for name in recipe.shipped()]
    assert len(set(prints)) == len(prints)


def test_a_recipe_is_found_by_name_with_ending_or_by_path(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text(RTN, encoding="utf-8")
    assert recipe.load("rtn-w4") == recipe.load("rtn-w4.yaml")
    assert recipe.load(str(own)).name == "mine"


def test_an_unknown_recipe_lists_the_shipped_ones_and_the_nearest():
    with pytest.raises(RecipeError, match=r"no shipped recipe of that name; shipped: .*gptq-w4") as raised:
        recipe.load("gptq-w44")
    assert raised.value.hint == "did you mean 'gptq-w4'?"
    with pytest.raises(RecipeError) as raised:
        recipe.load("nothing like it")
    assert "outlierq recipes list" in raised.value.hint


# What a good recipe becomes.


def test_options_of_a_method_are_told_from_the_keys_of_its_section():
    full = parse(FULL)
    assert full.quantize.options == {"damp": 0.02}
    assert full.transform[0].options == {"grid_points": 10}
    assert full.quantize.overrides[0].bits == 8
    assert full.calibration.text == (TextSource(path="embedded", weight=2),)


def test_a_method_without_options_may_be_written_as_its_name():
    assert parse("transform: [awq]\n" + GPTQ) == parse("transform: [{method: awq}]\n" + GPTQ)


@pytest.mark.parametrize("text", ["notes.txt", "[notes.txt]", "{path: notes.txt}", "[{path: notes.txt}]"])
def test_calibration_text_may_be_written_in_short(text):
    calibration = parse(f"calibration:\n  text: {text}\n{RTN}").calibration
    assert calibration.text == (TextSource(path="notes.txt"),)


def test_a_recipe_cannot_be_changed():
    full = parse(FULL)
    with pytest.raises(ValueError, match="frozen"):
        full.quantize.bits = 3


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        (RTN, set()),
        (GPTQ, {"hessian"}),
        ("quantize: {method: rtn, scale_search: mse}", set()),
        ("quantize: {method: rtn, scale_search: hessian}\ncalibration: {}", {"hessian"}),
        ("transform: [awq]\ncalibration: {}\n" + RTN, {"hessian", "abs_mean"}),
        ("export: {format: dense}", set()),
    ],
)
def test_a_recipe_knows_which_statistics_it_needs(text, needs):
    assert parse(text).needs == needs


@pytest.mark.parametrize(
    ("module", "scheme"),
    [
        ("model.layers.0.mlp.up_proj", QuantScheme(4, 64, True, "float16")),
        ("model.layers.0.self_attn.v_proj", QuantScheme(8, 32, True, "float16")),
        ("model.layers.0.self_attn.k_proj", QuantScheme(8, None, False, "float16")),
        ("model.layers.1.mlp.up_proj", None),
        ("lm_head", None),
        ("vision.patch", None),
    ],
)
def test_the_last_override_that_matches_a_module_wins(module, scheme):
    text = """
quantize:
  method: rtn
  group_size: 64
  ignore: ["*lm_head", "vision.*"]
  overrides:
    - {match: "*.[vk]_proj", bits: 8, group_size: 32}
    - {match: "*.k_proj", group_size: channel, symmetric: false}
    - {match: "model.layers.1.*", keep: true}
"""
    assert parse(text).scheme_for(module, "float16") == scheme


def test_without_a_quantize_section_every_linear_is_kept():
    assert parse("export: {format: dense}").scheme_for("model.layers.0.mlp.up_proj", "bfloat16") is None


# Faults.


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("description:", "descripton:", 1, "descripton: unknown key; did you mean 'description'?"),
        ("  samples:", "  sampels:", 6, "calibration.sampels: unknown key; did you mean 'samples'?"),
        ("      weight:", "      wieght:", 5, "calibration.text.0.wieght: unknown key; did you mean 'weight'?"),
        ("    grid_points:", "    gridpoints:", 9, "transform.0.gridpoints: unknown key; did you mean 'grid_points'?"),
        ("  bits: 4", "  bit: 4", 12, "quantize.bit: unknown key; did you mean 'bits'?"),
        ("  damp:", "  dampp:", 13, "quantize.dampp: unknown key; did you mean 'damp'?"),
        ("      bits:", "      bitts:", 16, "quantize.overrides.0.bitts: unknown key; did you mean 'bits'?"),
        ("  format:", "  fromat:", 18, "export.fromat: unknown key; did you mean 'format'?"),
        ("export:", "exprt:", 17, "exprt: unknown key; did you mean 'export'?"),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(old, new, line, message):
    assert old in FULL
    assert f"line {line}, {message}" in faults(FULL.replace(old, new, 1))


def test_a_key_like_no_other_gets_the_list_of_known_keys():
    assert "known keys: format, max_shard_size" in faults(RTN + "export:\n  zzz: 1\n")
    assert re.search(r"known keys: method, kind, bits, .*damp", faults(GPTQ.replace("gptq\n", "gptq\n  zzz: 1\n")))


def test_an_option_of_another_method_is_unknown():
    assert "line 3, quantize.damp: unknown key" in faults(RTN + "  damp: 0.1\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RTN + "  bits: 9\n", "line 3, quantize.bits: Input should be less than or equal to 8 (this is 9)"),
        (RTN + "  bits: 1\n", "line 3, quantize.bits: Input should be greater than or equal to 2"),
        (RTN + "  bits: four\n", "line 3, quantize.bits: Input should be a valid integer"),
        (RTN + "  bits: 4.5\n", "line 3, quantize.bits: Input should be a valid integer"),
        (RTN + "  group_size: 0\n", "line 3, quantize.group_size: must be a positive number of columns, or `channel`"),
        (
            RTN + "  group_size: row\n",
            "line 3, quantize.group_size: must be a positive number of columns, or `channel`",
        ),
        (RTN + "  symmetric: maybe\n", "line 3, quantize.symmetric: Input should be a valid boolean"),
        (RTN + "  ignore: lm_head\n", "line 3, quantize.ignore: Input should be a valid tuple"),
        (RTN + "  ignore: ['re:(']\n", "quantize.ignore: is no regular expression: missing )"),
        (RTN + "  ignore: ['re:(.*)*x']\n", "quantize.ignore: repeats a part that ends in a repetition"),
        (
            RTN + "  overrides:\n    - {match: 're:*', bits: 4}\n",
            "overrides.0.match: is no regular expression: nothing",
        ),
        (RTN + "  overrides:\n    - bits: 4\n", "line 4, quantize.overrides.0.match: Field required"),
        (
            RTN + "  scale_search: best\n",
            "line 3, quantize.scale_search: Input should be 'minmax', 'mse', 'importance' or 'hessian'",
        ),
        ("quantize:\n  bits: 4\n", "line 1, quantize.method: Field required"),
        ("quantize:\n  method: 4\n", "line 2, quantize.method: Input should be a valid string"),
        ("quantize: rtn\n", "line 1, quantize: Input should be a valid dictionary"),
        (RTN + "transform: awq\n", "line 3, transform: Input should be a valid tuple"),
        (RTN + "transform: [{}]\n", "line 3, transform.0.method: Field required"),
        (
            RTN + "calibration: {samples: 0}\n",
            "line 3, calibration.samples: Input should be greater than or equal to 1",
        ),
        (RTN + "calibration: {mode: fast}\n", "calibration.mode: Input should be 'static' or 'sequential'"),
        (RTN + "calibration: {text: [{path: a, dataset: b}]}\n", "text.0: give either `path` or `dataset`"),
        (RTN + "calibration: {text: [{}]}\n", "text.0: give either `path` or `dataset`"),
        (RTN + "calibration: {text: [{path: a, weight: 0}]}\n", "text.0.weight: Input should be greater than 0"),
        (
            RTN + "export: {format: onnx}\n",
            "line 3, export.format: there is no format 'onnx'; known: awq, ",
        ),
        (RTN + "export: {max_shard_size: 5XB}\n", "'5XB' is not a size; write for example 5GB or 512MiB"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(text, message):
    assert message in faults(text)


def test_all_faults_come_in_one_message_with_their_count():
    message = faults(
        "transform: [{method: awq, scaling: duoo}]\n"
        "quantize:\n  method: gptq\n  damp: x\n  bits: 1\n"
        "calibration: {sampels: 4}\n"
        "exprt: 1\n",
        name="mine",
    )
    assert message.startswith("recipe mine: 5 faults\n")
    for key in ("transform.0.scaling", "quantize.damp", "quantize.bits", "calibration.sampels", "exprt"):
        assert key in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a recipe is a mapping of keys to values, this is a list"),
        ("", "this is a NoneType"),
        ("quantize: [", "not valid YAML at line 1"),
        ("a: 1\n\tb: 2\n", "not valid YAML at line 2"),
    ],
)
def test_a_text_that_is_no_mapping_is_refused(text, message):
    assert message in faults(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantize: {method: gptq}", "calibration: missing, but the methods need hessian"),
        ("quantize: {method: rtn, scale_search: hessian}", "calibration: missing, but the methods need hessian"),
        ("transform: [awq]\n" + RTN, "calibration: missing, but the methods need abs_mean, hessian"),
        ("transform: [awq]\ncalibration: {}\nexport: {format: dense}", "there is nothing to transform for"),
        ("calibration: {}", "export.format: without a `quantize` section only `dense` can be written"),
        ("{}", "export.format: without a `quantize` section only `dense` can be written"),
        (
            RTN + "calibration: {skip_first_tokens: 64, sequence_length: 64}",
            "64 leaves nothing of a sequence_length of 64",
        ),
    ],
)
def test_an_impossible_combination_is_refused(text, message):
    assert message in faults(text)


# Faults that are not told well yet; strict, so that a repair shows itself.


def test_an_unknown_method_is_one_fault_among_others_with_its_line():
    message = faults("quantize:\n  method: gptqq\n  bits: 4\ntransform:\n  - awqq\n")
    assert "line 2, quantize.method: there is no quantize method 'gptqq'" in message
    assert "line 5, transform.0.method: there is no transform method 'awqq'" in message
    assert "did you mean 'gptq'?" in message


def test_a_name_is_no_key_of_a_recipe():
    assert "name: unknown key" in faults("name: mine\n" + RTN)


def test_a_key_that_is_given_twice_is_refused():
    assert "method" in faults(RTN + "  method: gptq\ncalibration: {}\n")


def test_a_word_for_the_group_size_is_one_fault_with_the_key_as_written():
    message = faults(RTN + "  group_size: row\n")
    assert "1 fault\n" in message
    assert "line 3, quantize.group_size: " in message


def test_an_infinite_size_is_refused():
    with pytest.raises(ValueError, match="is not a"):
        parse_size("1e400GB")


@pytest.mark.parametrize(
    "text",
    [
        "transform: [{method: awq, grid_points: 0}]\n" + GPTQ,
        "transform: [{method: awq, search_rows: 0}]\n" + GPTQ,
        GPTQ.replace("gptq\n", "gptq\n  damp: -1\n"),
        GPTQ.replace("gptq\n", "gptq\n  refine_passes: -1\n"),
    ],
)
def test_an_option_out_of_its_range_is_refused(text):
    assert "greater than" in faults(text)


# Settings from the command line.


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("quantize.bits=3", lambda r: r.quantize.bits == 3),
        ("quantize.symmetric=false", lambda r: r.quantize.symmetric is False),
        ("quantize.group_size=channel", lambda r: r.quantize.group_size == "channel"),
        ("quantize.damp=0.5", lambda r: r.quantize.options["damp"] == 0.5),
        ("quantize.ignore=['*up_proj', lm_head]", lambda r: r.quantize.ignore == ("*up_proj", "lm_head")),
        ("quantize.overrides.0.bits=2", lambda r: r.quantize.overrides[0].bits == 2),
        ("quantize.overrides=[]", lambda r: r.quantize.overrides == ()),
        ("transform.0.grid_points=5", lambda r: r.transform[0].options["grid_points"] == 5),
        ("transform.0=awq", lambda r: r.transform[0].options == {}),
        ("calibration.text=a=b.txt", lambda r: r.calibration.text[0].path == "a=b.txt"),
        ("calibration.text.0.weight=3", lambda r: r.calibration.text[0].weight == 3),
        ("calibration.seed=null", lambda r: r.calibration.seed is None),
        ("export.max_shard_size=2GB", lambda r: r.export.max_shard_size == "2GB"),
    ],
)
def test_a_setting_reaches_its_key(setting, read):
    assert read(parse(FULL, settings=[setting]))


def test_a_setting_may_begin_a_section():
    assert parse(RTN, settings=["calibration.samples=8"]).calibration.samples == 8
    assert parse(RTN, settings=["export.max_shard_size=1MiB"]).export.max_shard_size == "1MiB"
    assert parse(RTN + "calibration:\n", settings=["calibration.samples=8"]).calibration.samples == 8


def test_a_fault_in_a_setting_is_told_from_one_in_the_file():
    message = faults(FULL, settings=["quantize.bits=9"])
    assert "--set" in message
    assert "line" not in message


def test_of_two_settings_of_one_key_the_later_wins():
    assert parse(RTN, settings=["quantize.bits=3", "quantize.bits=8"]).quantize.bits == 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bits", "--set 'bits' is not of the form key=value"),
        ("=3", "--set '=3' is not of the form key=value"),
        ("quantize.bits=[4", "'[4' is not a YAML value"),
        ("quantize.method.name=3", "there is no 'name' in 'gptq'"),
        ("quantize.method.name.x=3", "there is no 'name' in 'gptq'"),
        ("transform.7.grid_points=5", "there is no '7' in a list of 1"),
        ("transform.7=awq", "there is no '7' in a list of 1"),
        ("transform.first=awq", "there is no 'first' in a list of 1"),
        ("quantize.bts=3", "quantize.bts: unknown key; did you mean 'bits'?"),
        ("quantze.bits=3", "quantze: unknown key; did you mean 'quantize'?"),
        ("quantize.bits=many", "quantize.bits: Input should be a valid integer"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused(setting, message):
    assert message in faults(FULL, settings=[setting])


# The fingerprint.

CHANNEL = "quantize.group_size=channel"
FP8 = ["quantize.bits=8", CHANNEL, "quantize.kind=float", "quantize.overrides=[]"]
EIGHT = "quantize.overrides.0={match: '*', bits: 8, group_size: channel}"
FLOAT = "quantize.overrides.0.kind=float"
Q4_K = ["quantize.group_size=32", "quantize.symmetric=false", "export.format=gguf", "quantize.overrides.0.bits=4"]


def float4(scales: str, columns: int, *, dynamic: bool) -> list[str]:
    """4-bit floats for weights and inputs."""
    inputs = f"{{kind: float, bits: 4, per: group, scales: {scales}, dynamic: {str(dynamic).lower()}}}"
    weights = ["quantize.kind=float", f"quantize.group_size={columns}", f"quantize.scales={scales}"]
    return [*weights, "quantize.overrides=[]", f"quantize.activations={inputs}"]


STATIC = "quantize.activations={dynamic: false, per: tensor}"
EIGHT_BIT_INPUTS = ["transform=[]", "quantize.activations={}"]
SEQUENTIAL = ["calibration.mode=sequential", "quantize={method: gptq}"]
LEARNING = [*SEQUENTIAL, "learn={method: block_round}"]
# By section and key: one setting that changes the key, or two lists of settings that differ in it.
CHANGES = {
    Calibration: {
        "unseen_tokens": "calibration.unseen_tokens=false",
        "text": "calibration.text=other.txt",
        "samples": "calibration.samples=17",
        "sequence_length": "calibration.sequence_length=99",
        "seed": "calibration.seed=1",
        "chat_template": "calibration.chat_template=true",
        "skip_first_tokens": "calibration.skip_first_tokens=1",
        "sink_weight": "calibration.sink_weight=2",
        "mode": "calibration.mode=sequential",
        "inputs": (EIGHT_BIT_INPUTS, [*EIGHT_BIT_INPUTS, "calibration.inputs=rounded"]),
        "batch_size": "calibration.batch_size=1",
        "all_experts": "calibration.all_experts=true",
        "min_expert_tokens": "calibration.min_expert_tokens=8",
        "images": "calibration.images=photos",
    },
    TextSource: {
        "path": "calibration.text.0.path=x",
        "dataset": "calibration.text=[{dataset: x}]",
        "column": "calibration.text.0.column=x",
        "split": "calibration.text.0.split=x",
        "config": "calibration.text.0.config=x",
        "weight": "calibration.text.0.weight=5",
    },
    Quantize: {
        "method": "quantize={method: rtn}",
        "kind": (["quantize.bits=8", CHANNEL], ["quantize.bits=8", CHANNEL, "quantize.kind=float"]),
        "block": (FP8, [*FP8, "quantize.block=[64,128]"]),
        "activations": "quantize.activations.kind=int",
        "bits": "quantize.bits=3",
        "group_size": "quantize.group_size=64",
        "symmetric": "quantize.symmetric=false",
        "scales": (Q4_K, [*Q4_K, "quantize.scales=two-level"]),
        "when_indivisible": "quantize.when_indivisible=keep",
        "ignore": "quantize.ignore=[]",
        "overrides": "quantize.overrides=[]",
        "keep_share": "quantize.keep_share=0.05",
        "options": "quantize.damp=0.03",
    },
    Override: {
        "match": "quantize.overrides.0.match=x",
        "keep": "quantize.overrides.0.keep=true",
        "bits": "quantize.overrides.0.bits=2",
        "group_size": "quantize.overrides.0.group_size=channel",
        "symmetric": "quantize.overrides.0.symmetric=false",
        "kind": ([EIGHT], [EIGHT, "quantize.overrides.0.kind=float"]),
        "block": ([EIGHT, FLOAT], [EIGHT, FLOAT, "quantize.overrides.0.block=[128,128]"]),
        "scales": (Q4_K, [*Q4_K, "quantize.overrides.0.scales=two-level"]),
        "activations": (
            ["quantize.activations={}"],
            ["quantize.activations={}", "quantize.overrides.0.activations=none"],
        ),
    },
    recipe.Activations: {
        "kind": ([*FP8, "quantize.activations={kind: float}"], ["quantize.activations={kind: int}"]),
        "bits": (["quantize.activations={}"], ["quantize.activations.bits=4"]),
        "dynamic": (["quantize.activations={}"], ["quantize.activations={dynamic: false, per: tensor}"]),
        "per": (
            [*FP8, "quantize.activations={kind: float}"],
            [*FP8, "quantize.block=[128,128]", "quantize.activations={kind: float, per: group}"],
        ),
        "clip_search": ([STATIC], [STATIC, "quantize.activations.clip_search=none"]),
        "scales": (float4("two-level", 16, dynamic=False), float4("power-of-two", 32, dynamic=True)),
    },
    recipe.KVCache: {
        "per": (["kv_cache={}"], ["kv_cache.per=head"]),
        "numbers": (["kv_cache={}"], ["kv_cache.numbers=int8"]),
    },
    recipe.Transform: {"method": "transform=[]", "options": "transform.0.scaling=duo"},
    recipe.Learn: {
        "method": (SEQUENTIAL, LEARNING),
        "options": (LEARNING, [*LEARNING, "learn.steps=3"]),
    },
    Export: {
        "format": "export.format=dense",
        "max_shard_size": "export.max_shard_size=1GB",
        "names": "export.names=class",
    },
}


@pytest.mark.parametrize("change", [s for settings in CHANGES.values() for s in settings.values()])
def test_the_fingerprint_changes_with_every_key(change):
    before, after = ([], [change]) if isinstance(change, str) else change
    assert parse(FULL, settings=after).fingerprint != parse(FULL, settings=before).fingerprint


def test_no_key_is_left_out_of_that_test():
    types = {"type", "mix", "embeddings"}  # of GGUF, instead of other keys: the next test
    # The number of shards may be left to the number of processes; runs keep it themselves.
    beside = {recipe.Calibration: {"shards"}, recipe.Quantize: types, Override: {"type"}}
    for section, settings in CHANGES.items():
        assert settings.keys() == section.model_fields.keys() - beside.get(section, set())
    assert Recipe.model_fields.keys() == {
        "description",
        "calibration",
        "transform",
        "quantize",
        "kv_cache",
        "export",
        "gate",
        "learn",
        "name",
    }


def test_the_fingerprint_changes_with_types_of_gguf():
    prints = [
        parse(f"quantize: {{method: rtn, {keys}}}\nexport: {{format: gguf}}").fingerprint
        for keys in (
            "type: Q4_K",
            "type: Q5_K",
            "mix: Q4_K_M",
            "mix: Q5_K_M",
            "mix: Q4_K_M, embeddings: Q6_K",
            "mix: Q4_K_M, overrides: [{match: '*v_proj', type: Q6_K}]",
            "mix: Q4_K_M, overrides: [{match: '*v_proj', type: Q8_0}]",
        )
    ]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_does_not_change_with_words_order_or_file_name():
    base = parse(FULL)
    assert parse(FULL, settings=["description=other words"]).fingerprint == base.fingerprint
    assert parse(FULL, settings=["gate.max_kl=0.05"]).fingerprint == base.fingerprint, "a gate only judges"
    assert parse(FULL, name="other").fingerprint == base.fingerprint
    assert parse("# a comment\n" + FULL).fingerprint == base.fingerprint
    head, tail = FULL.split("export:")
    assert parse("export:" + tail + head).fingerprint == base.fingerprint


# Sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 GB", 5 * 10**9),
        ("1.5gb", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("10kb", 10_000),
        ("1KiB", 1024),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_a_size_is_read_with_decimal_and_binary_units(text, size):
    assert parse_size(text) == size


def test_a_bare_number_is_a_size_in_bytes():
    assert parse(RTN, settings=["export.max_shard_size=5000"]).export.max_shard_size == "5000"


@pytest.mark.parametrize("text", ["", "GB", "five", "5XB", "5TB", "-1GB", "0", "0.1B", "nan", "5 G B B"])
def test_a_text_that_is_no_positive_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


class TestPublished:
    """Recipes from the reports of what they made."""

    @pytest.mark.parametrize("name", sorted(shipped()))
    def test_what_a_report_keeps_of_a_shipped_recipe_reads_as_the_same_recipe(self, name):
        recipe = load(name)
        again = parse(recipe_yaml(recipe.model_dump(mode="json")), name=name)
        assert again == recipe and again.fingerprint == recipe.fingerprint

    @pytest.mark.parametrize(
        "setting",
        ["quantize.ignore=[]", "calibration.seed=null", "gate.max_kl=0.1", "calibration.text=[a.txt, {dataset: x/y}]"],
    )
    def test_empty_values_that_mean_something_are_kept(self, setting):
        recipe = load("gptq-w4", [setting])
        assert parse(recipe_yaml(recipe.model_dump(mode="json")), name="gptq-w4") == recipe

    @pytest.fixture
    def report(self, tmp_path):
        """A folder with a report of a newer outlierq. Written by `change`."""

        def change(**values):
            settings = load("gptq-w4").model_dump(mode="json")
            content = {"recipe": "gptq-w4", "settings": settings, "versions": {"outlierq": "99.0"}} | values
            (tmp_path / "outlierq.json").write_text(json.dumps(content))
            return str(tmp_path)

        return change

    def test_a_recipe_of_a_newer_version_runs_where_nothing_in_it_is_new(self, report):
        assert load(report()) == load("gptq-w4")

    def test_a_recipe_that_is_newer_than_this_version_says_so(self, report):
        settings = load("gptq-w4").model_dump(mode="json")
        for new in ({"sparkle": {"level": 3}}, {"quantize": settings["quantize"] | {"method": "gptq9"}}):
            with pytest.raises(
                RecipeError, match=r"(?s)made by outlierq 99\.0, and this is .*(sparkle|gptq9)"
            ) as error:
                load(report(settings=settings | new))
            assert "--upgrade" in error.value.hint

    @pytest.mark.parametrize("values", [{"settings": None}, {"recipe": 3}, {"settings": []}])
    def test_a_report_without_a_recipe_is_said(self, report, values):
        with pytest.raises(RecipeError, match="holds no recipe"):
            load(report(**values))

    def test_a_folder_without_a_report_is_said(self, tmp_path):
        with pytest.raises(RecipeError, match="no recipe is known of it"):
            load(str(tmp_path))

    @pytest.mark.parametrize("reference", ["hf:", "hf:x", "hf:a/b/c", "hf:../b@", "hf:a b/c"])
    def test_what_is_no_name_on_the_hub_is_said(self, reference):
        with pytest.raises(RecipeError, match="no recipe on the Hub"):
            load(reference)

    def test_a_repository_that_outlierq_did_not_make_is_said(self, hub, outlierq):
        answer = outlierq("plan", "x", "-r", "hf:alice/none")
        assert answer.code == 1 and "recipe of alice/none cannot be read" in answer.err
