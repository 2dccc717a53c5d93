"""Models that see or hear: the decoder inside is compressed, the towers beside it stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from multimodal import MODELS, inputs_of, write_model
from safetensors.torch import load_file

from outlierq.core.errors import SourceError
from outlierq.load import build_skeleton, load_model, open_checkpoint, study
from outlierq.load.model.decoder import block_list
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

SETTINGS = {
    "rtn-w8": [],
    "awq-gptq-w4": ["quantize.group_size=32", "calibration.samples=4", "calibration.sequence_length=32"],
}
FAST = ("qwen2.5-vl", "qwen3.5", "gemma3", "qwen2-audio")
NOT_YET = ("gemma4", "llama4")
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in (*FAST, *NOT_YET)]


@pytest.fixture(scope="module")
def made(tools, tmp_path_factory):
    """Makes the models that are asked for, each once. Read-only."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = write_model(name, tmp_path_factory.mktemp(name) / "source", tools.write_tokenizer)
        return folders[name]

    return make


@pytest.mark.parametrize("recipe", SETTINGS)
@pytest.mark.parametrize("name", [*FAST, *LATER])
def test_text_images_and_sound_give_what_the_decoded_model_gives_in_the_class_that_config_names(
    name, recipe, made, tmp_path
):
    source, out = made(name), tmp_path / "out"
    quantize(make_plan(open_checkpoint(str(source)), load(recipe, SETTINGS[recipe])), out)
    assert verify(str(out), original=str(source)).faults == []
    kind = getattr(transformers, MODELS[name][0])
    theirs, info = kind.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = load_model(open_checkpoint(str(out)), dtype="bfloat16")
    given = inputs_of(name, ours)
    for inputs in ({"input_ids": given["input_ids"] % 250 + 10}, given):
        with torch.no_grad():
            assert torch.equal(theirs.eval()(**inputs).logits, ours(**inputs).logits)


@pytest.mark.parametrize("name", [*FAST, *LATER])
def test_every_linear_of_the_decoder_is_quantized_and_no_tensor_of_a_tower_changes(name, made, tmp_path):
    source, out = made(name), tmp_path / "out"
    plan = make_plan(open_checkpoint(str(source)), load("rtn-w8", []))
    towers = [planned for planned in plan.sites if planned.site.tower is not None]
    inside = [planned for planned in plan.sites if planned.site.block is not None]
    assert inside and all(planned.scheme is not None for planned in inside)
    assert towers and all("no part of the language model" in planned.reason for planned in towers)
    quantize(plan, out)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    replaced = {planned.site.weight for planned in inside}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - replaced)
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert {planned.site.module for planned in towers} <= set(kept)


def test_an_override_that_names_a_tower_quantizes_it(made):
    settings = ["quantize.overrides=[{match: '*.visual.*', bits: 8}]"]
    plan = make_plan(open_checkpoint(str(made("qwen2.5-vl"))), load("rtn-w8", settings))
    assert all(planned.scheme is not None for planned in plan.sites if planned.site.tower == "model.visual")


def test_the_blocks_are_those_that_text_runs_through_however_large_a_tower_is(made):
    model = study(open_checkpoint(str(made("qwen2.5-vl"))))
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in model.skeleton.named_modules()
        if isinstance(part, torch.nn.ModuleList)
    }
    assert max(sizes, key=sizes.__getitem__) == "model.visual.blocks"
    assert block_list(model.skeleton)[0] == "model.language_model.layers"


def test_without_a_named_class_transformers_builds_the_one_of_the_model_type(made):
    checkpoint = open_checkpoint(str(made("qwen2-audio")))
    checkpoint.config = {key: value for key, value in checkpoint.config.items() if key != "architectures"}
    assert type(build_skeleton(checkpoint)).__name__ == "Qwen2AudioForConditionalGeneration"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "t5"}, "model_type 't5', which is not supported: transformers has no decoder"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "model_type 't5', which is not supported: T5ForConditionalGeneration is an encoder with a decoder",
        ),
        ({"model_type": "siglip"}, "model_type 'siglip', which is not supported"),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_sentence(changed, said, tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    checkpoint.config = changed
    with pytest.raises(SourceError) as refused:
        build_skeleton(checkpoint)
    assert said in refused.value.what and len(refused.value.what) < 250
    assert "also those inside models that see or hear" in refused.value.hint
