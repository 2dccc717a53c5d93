"""Biases of zeros where the class takes them: shifts of Llama-like models, exact, loaded by the stock class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from fakes import FakeCheckpoint
from test_discovery import LLAMA
from test_rotate import difference, logits, save

from outlierq.core.model import TensorInfo
from outlierq.load import build_skeleton, open_checkpoint
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.remodel import openings as module
from outlierq.pipeline.remodel.openings import find_openings
from outlierq.pipeline.remodel.rewrite import rewritten
from outlierq.recipe import Export, parse
from outlierq.transform.add_biases import BiasKey, Openings, Shift, add_biases

WIDE = {**LLAMA, "head_dim": 16}

# name -> (config class, arguments, keys that are turned over, suffixes of the inputs that can be shifted then)
ARCHITECTURES = {
    "llama": ("LlamaConfig", LLAMA, {"attention_bias": True}, ("o_proj",)),
    "qwen3, norms of queries and keys": ("Qwen3Config", WIDE, {"attention_bias": True}, ("o_proj",)),
    "gemma, 1 + w": ("GemmaConfig", WIDE, {"attention_bias": True}, ("o_proj",)),
    "cohere, layer norm without bias": ("CohereConfig", LLAMA, {"attention_bias": True}, ("o_proj",)),
    "nemotron, offset layer norm": (
        "NemotronConfig",
        LLAMA,
        {"attention_bias": True, "mlp_bias": True},
        ("q_proj", "o_proj", "up_proj"),
    ),
    "starcoder2, one key": (
        "Starcoder2Config",
        {**LLAMA, "use_bias": False},
        {"use_bias": True},
        ("q_proj", "o_proj", "c_fc"),
    ),
    "qwen2, whose o_proj takes none": ("Qwen2Config", LLAMA, {}, ()),
    "mistral, whose class has no key": ("MistralConfig", LLAMA, {}, ()),
}
ADD = parse("transform: [add_biases]\nexport: {format: dense}")
SHIFTING = """
calibration: {samples: 6, sequence_length: 32}
transform: [add_biases, {method: os_plus, grid_points: 8}]
quantize: {method: rtn, bits: 8, group_size: channel, activations: {}}
"""


@pytest.fixture(scope="module")
def offset_llama(tmp_path_factory, tools) -> Path:
    """Values of attention whose channels lie far from zero: the tokens' average, through v_proj, is large."""
    folder = tmp_path_factory.mktemp("models") / "offset-llama"
    tools.write_llama(folder, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        common = torch.randn(64, generator=generator)
        model.model.embed_tokens.weight.add_(0.5 * common)
        for block in model.model.layers:
            offset = torch.zeros(32)
            offset[torch.randperm(32, generator=generator)[:5]] = torch.tensor([4.0, -6.0, 5.0, 3.0, -4.0])
            block.self_attn.v_proj.weight.add_(offset[:, None] * common / common.norm() / 8)
    model.save_pretrained(folder)
    return folder


def opened_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_keys_that_make_a_shift_possible_are_found_and_no_others(name, tmp_path):
    config_class, arguments, keys, shifted = ARCHITECTURES[name]
    original = save(tmp_path / "source", config_class, arguments)
    checkpoint = open_checkpoint(str(tmp_path / "source"))
    wider = rewritten(checkpoint, ADD)
    assert {path: value for (path,), value in wider.rewrite.settings.items()} == keys
    assert {name.rpartition(".")[2] for name in wider.rewrite.shifts} == set(shifted)
    assert len(wider.rewrite.shifts) == 2 * len(shifted)
    assert ("nothing is added" in wider.notes[0]) == (not keys)
    added = wider.tensors.keys() - checkpoint.tensors.keys()
    wanted = build_skeleton(wider).state_dict().keys() - original.state_dict().keys()
    assert added == wanted
    quantize(make_plan(checkpoint, ADD), tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(stock), logits(original))


def test_the_plan_says_what_is_added_and_the_size_to_the_byte(tiny_llama, tmp_path):
    plan = make_plan(open_checkpoint(str(tiny_llama)), parse(SHIFTING))
    # 2 blocks: queries and o_proj 64 outputs, keys and values 32, of 2 bytes.
    said = "add_biases: attention_bias: true adds 8 biases, 768 bytes; 2 inputs can be shifted"
    assert said in plan.notes
    out = tmp_path / "out"
    quantize(plan, out)
    written = sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json")
    assert written == plan.output_bytes
    biases = [name for name in plan.layout.places if name.endswith("bias")]
    assert len(biases) == 8 and sum(plan.layout.places[name].tensor.nbytes for name in biases) == 768


def test_the_shift_of_the_values_is_exact_and_the_other_biases_stay_zero(offset_llama, tmp_path):
    out = tmp_path / "out"
    recipe = parse(SHIFTING)
    report = quantize(make_plan(open_checkpoint(str(offset_llama)), recipe), out)
    shifted = [row for row in report.transforms if row.get("shift_max", 0) > 0]
    assert [row["group"].rpartition(".")[2] for row in shifted] == ["o_proj"] * 2
    left = [row for row in report.transforms if row not in shifted]
    assert len(left) == 6 and all("no shift: there is no bias beside" in row["note"] for row in left)
    found = open_checkpoint(str(out))
    for block in (0, 1):
        biases = {kind: found.read(f"model.layers.{block}.self_attn.{kind}_proj.bias") for kind in "qkvo"}
        assert biases["q"].eq(0).all() and biases["k"].eq(0).all()
        assert biases["v"].ne(0).any() and biases["o"].ne(0).any()


def test_shifts_and_zeros_leave_the_function_as_it_is(offset_llama, tmp_path):
    # Weights in 8 bits per group of 16 err little; a shift that did not cancel would err by as much as the values.
    fine = ["quantize.group_size=16", "quantize.activations=null"]
    recipe = parse(SHIFTING.replace("transform: [add_biases, ", "transform: ["), settings=fine)
    errors = {}
    for name, chosen in {"without": recipe, "with": parse(SHIFTING, settings=fine)}.items():
        quantize(make_plan(open_checkpoint(str(offset_llama)), chosen), tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        source = transformers.AutoModelForCausalLM.from_pretrained(offset_llama, dtype=torch.float32).eval()
        errors[name] = difference(logits(model), logits(source))
    assert errors["with"] < 1.2 * errors["without"] < 0.05


def test_statistics_of_the_model_without_the_biases_serve_the_model_with_them(offset_llama, outlierq, tmp_path):
    stats, recipe = tmp_path / "stats", tmp_path / "shifting.yaml"
    recipe.write_text(SHIFTING)
    words = ("--recipe", recipe, "-q")
    assert outlierq("calibrate", offset_llama, "-o", stats, *words).code == 0
    for name, given in {"direct": (), "static": ("--stats", stats)}.items():
        answer = outlierq("quantize", offset_llama, *words, *given, "-o", tmp_path / name)
        assert answer.code == 0, answer.err
    direct, static = (open_checkpoint(str(tmp_path / name)) for name in ("direct", "static"))
    assert direct.tensors.keys() == static.tensors.keys()
    assert all(torch.equal(direct.read(name), static.read(name)) for name in direct.tensors)


def test_a_rotated_model_can_be_shifted_too(offset_llama, tmp_path):
    both = SHIFTING.replace("[add_biases", "[rotate, add_biases")
    report = quantize(make_plan(open_checkpoint(str(offset_llama)), parse(both)), tmp_path / "out")
    assert any("float32 logits differ by" in note for note in report.notes)
    other = SHIFTING.replace("[add_biases", "[add_biases, rotate")
    report = quantize(make_plan(open_checkpoint(str(offset_llama)), parse(other)), tmp_path / "other")
    assert any("float32 logits differ by" in note for note in report.notes)


def test_biases_of_zeros_alone_need_no_proof_of_the_whole_model(tiny_llama, tmp_path):
    report = quantize(make_plan(open_checkpoint(str(tiny_llama)), ADD), tmp_path / "out")
    assert not any("float32 logits differ by" in note for note in report.notes)
    assert opened_config(tmp_path / "out")["attention_bias"] is True


def test_a_format_that_cannot_hold_new_biases_gets_none_and_the_report_says_so(tiny_llama):
    recipe = parse(SHIFTING.replace("bits: 8, group_size: channel, activations: {}", "bits: 8, group_size: 32"))
    recipe = recipe.model_copy(update={"export": Export(format="gguf")})
    plan = make_plan(open_checkpoint(str(tiny_llama)), recipe)
    assert any("add_biases: nothing is added: llama.cpp reads" in note for note in plan.notes)
    assert not any(name.endswith("bias") for name in plan.layout.places)


def test_biases_that_change_what_the_class_computes_are_not_added(tiny_llama, monkeypatch):
    # As if the key did more than to make places: the error of zeros is found on random weights.
    monkeypatch.setattr(module, "relative_error", lambda found, expected: 0.5)
    found = find_openings(open_checkpoint(str(tiny_llama)))
    assert found.obstacle == "biases of zeros change the output of model.layers.0 by 0.5"
    assert "nothing is added: biases of zeros change" in add_biases(found).notes[0]


def test_a_key_of_a_nested_config_is_set_where_it_lies():
    from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint
    from outlierq.transform.rotate import Rewrite

    config = {"model_type": "outer", "text_config": {"mlp_bias": False, "width": 4}}
    source = FakeCheckpoint(config=config)
    settings = {("text_config", "mlp_bias"): True}
    wider = RewrittenCheckpoint(source, Rewrite({}, settings=settings), "add_biases")
    assert wider.config == {"model_type": "outer", "text_config": {"mlp_bias": True, "width": 4}}
    assert config["text_config"]["mlp_bias"] is False


def test_only_keys_that_a_shift_needs_are_used():
    tensors = {name: TensorInfo(name, "BF16", (4,), 8) for name in ("v.bias", "o.bias", "up.bias")}
    attention = BiasKey(("attention_bias",), True, {name: tensors[name] for name in ("v.bias", "o.bias")})
    mlp = BiasKey(("text_config", "mlp_bias"), True, {"up.bias": tensors["up.bias"]})
    shifts = {"o": Shift("v.bias", frozenset({"v.bias", "o.bias"}), "proved")}
    rewrite = add_biases(Openings((attention, mlp), shifts))
    assert rewrite.settings == {("attention_bias",): True} and rewrite.zeros.keys() == {"v.bias", "o.bias"}
    assert rewrite.shifts == {"o": ("v.bias", "proved")}
    assert add_biases(Openings((attention, mlp))).zeros == {}
