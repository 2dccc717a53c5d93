"""Models that see or hear: the decoder inside is compressed, the towers beside it stay as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import multimodal
import pytest
import torch
import transformers
from multimodal import MODELS, inputs_of, write_model
from safetensors.torch import load_file

from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.calibrate.text.chats import rendered
from outlierq.core.errors import RecipeError, SourceError, StatsError
from outlierq.load import build_skeleton, find_structure, load_model, load_tokenizer, open_checkpoint, study
from outlierq.load.model.decoder import block_list
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

SETTINGS = {
    "rtn-w8": [],
    "awq-gptq-w4": ["quantize.group_size=32", "calibration.samples=4", "calibration.sequence_length=32"],
}
FAST = ("qwen2.5-vl", "qwen3.5", "gemma4", "qwen2-audio")
CHAT = (
    "{% for m in messages %}<s>{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}</s>{% endfor %}"
)
LATER = [pytest.param(name, marks=pytest.mark.slow, id=name) for name in MODELS if name not in FAST]
# Each fast model with the quick recipe, one of them with both.
USUALLY = [*((name, "rtn-w8") for name in FAST), (FAST[0], "awq-gptq-w4")]
BOTH = [
    pytest.param(name, recipe, marks=() if (name, recipe) in USUALLY else pytest.mark.slow, id=f"{name}-{recipe}")
    for name in MODELS
    for recipe in SETTINGS
]


@pytest.fixture(scope="module")
def made(tools, tmp_path_factory):
    """Makes the models that are asked for, each once. Read-only."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = write_model(name, tmp_path_factory.mktemp(name) / "source", tools.write_tokenizer)
        return folders[name]

    return make


@pytest.mark.parametrize(("name", "recipe"), BOTH)
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
    assert inside and all(planned.scheme is not None or planned.site.kind == "Router" for planned in inside)
    assert towers and all("no part of the language model" in planned.reason for planned in towers)
    quantize(plan, out)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    before = {name: tensor for name, tensor in before.items() if ".experts." not in name}  # written one by one
    replaced = {planned.site.weight for planned in plan.sites if planned.scheme is not None}
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


@pytest.mark.parametrize("name", ["qwen3-vl", "mllama", "gemma4", *(each for each in LATER if each.id != "llama4")])
def test_blocks_run_one_by_one_on_images_give_the_hidden_states_of_the_whole_model(name, made):
    checkpoint = open_checkpoint(str(made(name)))
    model = load_model(checkpoint)
    structure = find_structure(checkpoint, model)
    given = inputs_of(name, model)
    ids = given.pop("input_ids")
    nothing = PartWeights(lambda part: None, lambda part: None)
    runner = BlockRunner(model, structure, nothing, dtype=torch.float32, batch_size=1)
    hidden = runner.start(torch.cat([ids, ids]), inputs=[given, {}], whole=True)
    outputs = []
    handle = model.get_submodule(structure.blocks[-1].name).register_forward_hook(lambda *a: outputs.append(a[2]))
    with torch.no_grad():
        model(input_ids=ids, **given)
        model(input_ids=ids)
    handle.remove()
    for block in structure.blocks:
        runner.run(model.get_submodule(block.name), block.index, hidden)
    for batch, output in enumerate(outputs):
        whole = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(hidden[batch], whole, rtol=1e-4, atol=1e-5)
    assert not torch.equal(hidden[0], hidden[1])


def test_the_stream_that_images_enter_is_not_rotated(made, tmp_path):
    source, out = made("qwen2.5-vl"), tmp_path / "out"
    settings = ["calibration.samples=4", "calibration.sequence_length=32"]
    plan = make_plan(open_checkpoint(str(source)), load("rotate-w4a8", settings))
    assert [note for note in plan.notes if "residual stream is left as it is: features of images" in note]
    quantize(plan, out)
    dense = tmp_path / "dense"
    rotated = load("dense", ["transform=[{method: rotate}]"])
    quantize(make_plan(open_checkpoint(str(source)), rotated), dense)
    before, after = (load_model(open_checkpoint(str(folder))) for folder in (source, dense))
    with torch.no_grad():
        logits = [model(**inputs_of("qwen2.5-vl", model)).logits for model in (before, after)]
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [("w8a8-static", "got no tokens"), ("kv-fp8", "does not run its block for the calibration text")],
)
def test_what_needs_the_inputs_of_blocks_that_text_passes_over_asks_for_images(recipe, said, made, tmp_path):
    settings = ["calibration.samples=4", "calibration.sequence_length=32"]
    plan = make_plan(open_checkpoint(str(made("mllama"))), load(recipe, settings))
    with pytest.raises(StatsError, match=said) as refused:
        quantize(plan, tmp_path / "out")
    assert "calibration.images" in refused.value.hint


def _llava_processor(tokenizer, pil) -> transformers.ProcessorMixin:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return transformers.LlavaProcessor(
        image_processor=pil("llava", "Llava")(**crop), tokenizer=tokenizer, patch_size=4,
        vision_feature_select_strategy="full", image_token="<image>", chat_template=CHAT,
    )  # fmt: skip


def _gemma3_processor(tokenizer, pil) -> transformers.ProcessorMixin:
    images = pil("gemma3", "Gemma3")(size={"height": 16, "width": 16})
    template = CHAT.replace("<image>", "<boi>")
    return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)


def _idefics3_processor(tokenizer, pil) -> transformers.ProcessorMixin:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    size = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}, "do_image_splitting": False}
    return transformers.Idefics3Processor(
        pil("idefics3", "Idefics3")(**size), tokenizer, image_seq_len=4, chat_template=CHAT
    )


# Those of processors that need Pillow alone, and no torchvision.
PROCESSORS = {"llava": _llava_processor, "gemma3": _gemma3_processor, "idefics3": _idefics3_processor}
MARKS = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}


def _write_with_processor(name: str, folder: Path, write_tokenizer) -> Path:
    """A model that sees, its processor, and a folder of three images beside it."""
    image = pytest.importorskip("PIL.Image")

    def pil(module: str, kind: str) -> type:
        place = pytest.importorskip(f"transformers.models.{module}.image_processing_pil_{module}")
        return getattr(place, f"{kind}ImageProcessorPil")

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(multimodal.TEXT, "vocab_size", multimodal.VOCABULARY + 8)  # room for marks of images
        write_model(name, folder, write_tokenizer)
    marks = {"extra_special_tokens": MARKS} if name == "gemma3" else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **marks)
    PROCESSORS[name](tokenizer, pil).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    key = "image_token_index" if "image_token_index" in config else "image_token_id"
    config[key] = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(config))
    photos = folder.parent / "photos"
    photos.mkdir()
    for number, colour in enumerate(["red", "green", "blue"]):
        image.new("RGB", (40, 30), colour).save(photos / f"{colour}.png")
        if number:
            (photos / f"{colour}.txt").write_text(f"all {colour}")
    return folder


class TestImages:
    """Calibration with images, through a processor that needs Pillow alone."""

    @pytest.fixture(scope="class")
    def seeing(self, tmp_path_factory, tools):
        """A function from a family to a model of it with its processor, made once. Read-only."""
        folders: dict[str, Path] = {}

        def make(name: str) -> Path:
            if name not in folders:
                place = tmp_path_factory.mktemp(f"{name}-images") / "source"
                folders[name] = _write_with_processor(name, place, tools.write_tokenizer)
            return folders[name]

        return make

    @pytest.fixture
    def llava(self, seeing) -> Path:
        """A LLaVA with its processor, and a folder of three images beside it. Read-only."""
        return seeing("llava")

    @pytest.mark.parametrize("name", PROCESSORS)
    def test_text_and_images_give_the_same_after_calibration_with_images_and_a_reload(self, name, seeing, tmp_path):
        from PIL import Image

        source, out = seeing(name), tmp_path / "out"
        quantize(
            make_plan(open_checkpoint(str(source)), load("awq-gptq-w4", self.settings(source.parent / "photos"))), out
        )
        assert "3 of 5 calibration windows begin with an image" in " ".join(
            json.loads((out / "outlierq.json").read_text())["notes"]
        )
        theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        ours = load_model(open_checkpoint(str(out)), dtype="bfloat16")
        processor = transformers.AutoProcessor.from_pretrained(out)
        photo = Image.open(source.parent / "photos" / "red.png")
        for seen in ([], [{"type": "image", "image": photo}]):
            asked = [{"role": "user", "content": [*seen, {"type": "text", "text": "what is this?"}]}]
            inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt")
            assert ("pixel_values" in inputs) == bool(seen)
            with torch.no_grad():
                assert torch.equal(theirs.eval()(**inputs).logits, ours(**inputs).logits)

    def settings(self, folder: Path, **more: object) -> list[str]:
        given = {"images": folder, "samples": 5, "sequence_length": 64, **more}
        return ["quantize.group_size=32", *(f"calibration.{key}={value}" for key, value in given.items())]

    def test_the_statistics_are_those_of_text_and_images(self, llava, tmp_path):
        source = open_checkpoint(str(llava))
        recipe = load("awq-gptq-w4", self.settings(llava.parent / "photos"))
        quantize(make_plan(source, recipe), tmp_path / "out")
        said = json.loads((tmp_path / "out" / "outlierq.json").read_text())
        assert "3 of 5 calibration windows begin with an image of photos" in said["notes"]
        assert verify(str(tmp_path / "out"), original=str(llava)).faults == []
        carried = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"processor_config.json", "chat_template.jinja"} <= carried

    @pytest.mark.parametrize("broken", ["no folder", "no image", "broken", "long"])
    def test_images_that_cannot_be_used_are_refused_in_one_sentence_and_nothing_is_written(
        self, broken, llava, tmp_path
    ):
        folder, more = tmp_path / "photos", {}
        if broken != "no folder":
            folder.mkdir()
        if broken == "broken":
            whole = (llava.parent / "photos" / "red.png").read_bytes()
            (folder / "red.png").write_bytes(whole[: len(whole) // 2])
        if broken == "long":
            folder, more = llava.parent / "photos", {"sequence_length": 16}
        recipe = load("awq-gptq-w4", self.settings(folder, **more))
        with pytest.raises(StatsError) as refused:
            quantize(make_plan(open_checkpoint(str(llava)), recipe), tmp_path / "out")
        expected = {
            "no folder": "cannot read the folder of images",
            "no image": "photos holds no image",
            "broken": "red.png cannot be read as an image",
            "long": "but windows have 16",
        }
        assert expected[broken] in refused.value.what and refused.value.hint
        assert not (tmp_path / "out").exists()

    def test_a_model_without_eyes_takes_no_images(self, tiny_llama, tmp_path):
        recipe = load("awq-gptq-w4", self.settings(tmp_path))
        with pytest.raises(RecipeError, match="LlamaForCausalLM has no part that sees images"):
            quantize(make_plan(open_checkpoint(str(tiny_llama)), recipe), tmp_path / "out")


@pytest.mark.parametrize("kept_in", ["chat_template.json", "chat_template.jinja"])
def test_chats_are_rendered_by_a_template_that_wants_parts_wherever_it_is_kept(kept_in, made, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(made("qwen2.5-vl"), folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / kept_in).write_text(json.dumps({"chat_template": CHAT}) if kept_in.endswith("json") else CHAT)
    messages = [{"role": "user", "content": "what is this?"}, {"role": "assistant", "content": "a cat"}]
    tokenizer = load_tokenizer(open_checkpoint(str(folder)))
    assert rendered(tokenizer, messages, "row 0") == "<s>what is this?</s><s>a cat</s>"
