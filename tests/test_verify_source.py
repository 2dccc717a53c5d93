"""`verify --source` repeats on the source what the recipe did, then judges absolute errors; `diff` does likewise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outlierq.load import open_checkpoint
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.checking.source.against import check_error
from outlierq.pipeline.diff import diff
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import Verification, verify
from outlierq.recipe import load

SMALL = ["calibration.samples=6", "calibration.sequence_length=32"]
SITE = "model.layers.1.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"
RECIPES = {
    "plain": ("rtn-w4", ["quantize.group_size=32"]),
    "folded": ("awq-w4", ["quantize.group_size=32", *SMALL]),
    "shifted": ("os-plus-w8a8", SMALL),
    "rotated": ("rotate-w8a8", SMALL),
    "ordered": ("int8-split", [*SMALL, "quantize.threshold=0.5"]),
}


@pytest.fixture(scope="module")
def sound(untied_llama, tmp_path_factory) -> Callable[[str], Path]:
    """A sound result by kind, made once. Read-only."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "out"
            name, settings = RECIPES[kind]
            quantize(make_plan(open_checkpoint(str(untied_llama)), load(name, settings)), made[kind])
        return made[kind]

    return folder


@pytest.fixture
def damaged(sound, tmp_path) -> Callable[..., Path]:
    """A copy after `change(tensors)`, with a report that has no record: what was written wrong in the first place."""

    def make(kind: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        folder = Path(shutil.copytree(sound(kind), tmp_path / "damaged"))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        report = json.loads((folder / "outlierq.json").read_text())
        (folder / "outlierq.json").write_text(json.dumps(report | {"record": None}))
        return folder

    return make


def said(found: Verification) -> str:
    return "\n".join(f"{fault.check} | {fault.tensor} | {fault.what}" for fault in found.faults)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_sound_result_has_no_fault_and_small_errors_whatever_moved_its_weights(kind, sound, untied_llama):
    found = verify(str(sound(kind)), str(untied_llama))
    assert found.sound, said(found)
    assert len(found.errors) == found.linears == 21
    assert max(found.errors.values()) < (0.15 if kind in ("plain", "folded") else 0.02)


@pytest.mark.parametrize("kind", ["plain", "folded", "rotated", "ordered"])
def test_a_linear_of_zeros_is_found(kind, damaged, untied_llama):
    role = "weight_packed" if kind in ("plain", "folded") else "weight"

    def change(tensors):
        for name in (f"{SITE}.{role}", f"{SITE}.outlier_weight"):
            if name in tensors:
                tensors[name] = torch.zeros_like(tensors[name])

    found = verify(str(damaged(kind, change)), str(untied_llama))
    assert f"{SITE}.weight" in {fault.tensor for fault in found.faults}, said(found)


@pytest.mark.parametrize("factor", [0.0, -1.0, 4.0])
def test_a_row_of_scales_times_any_factor_is_found(factor, damaged, untied_llama):
    def change(tensors):
        tensors[f"{SITE}.weight_scale"][3] *= factor

    found = verify(str(damaged("folded", change)), str(untied_llama))
    assert f"{SITE}.weight" in {fault.tensor for fault in found.faults}, said(found)


def test_one_code_one_group_and_two_exchanged_rows_are_found(damaged, untied_llama, tmp_path):
    def code(tensors):
        tensors[f"{SITE}.weight_packed"][3, 1] ^= 8

    def group(tensors):
        tensors[f"{SITE}.weight_scale"][3, 1] *= 256

    def rows(tensors):
        tensors[f"{SITE}.weight_packed"][[3, 20]] = tensors[f"{SITE}.weight_packed"][[20, 3]]

    for change, what in ((code, "1 of 6144 weights"), (group, "scales is"), (rows, "2 of 96 rows")):
        found = verify(str(damaged("plain", change)), str(untied_llama))
        assert what in said(found), said(found)
        shutil.rmtree(tmp_path / "damaged")


def test_every_tensor_that_nothing_changed_is_equal_bit_for_bit(damaged, untied_llama, tmp_path):
    changes = {
        "model.embed_tokens.weight": lambda t: t.flip(0),
        "lm_head.weight": lambda t: torch.cat([t[1:], t[:1]]),
        "model.norm.weight": lambda t: t * 1.01,
        "model.layers.0.self_attn.q_proj.bias": lambda t: t + 1e-3,
    }
    for name, edit in changes.items():

        def change(tensors, name=name, edit=edit):
            tensors[name] = edit(tensors[name]).contiguous()

        found = verify(str(damaged("plain", change)), str(untied_llama))
        assert [(fault.check, fault.tensor) for fault in found.faults] == [("source", name)]
        shutil.rmtree(tmp_path / "damaged")


def test_a_fold_is_undone_exactly_so_that_a_wrong_gain_shows_in_what_reads_it(damaged, untied_llama):
    def change(tensors):
        tensors[NORM] = tensors[NORM] * 2

    found = verify(str(damaged("folded", change)), str(untied_llama))
    assert {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"} <= {f.tensor for f in found.faults}


def test_a_gain_that_lost_its_sign_is_no_fold(damaged, untied_llama):
    def change(tensors):
        tensors[NORM][5] = -tensors[NORM][5]

    found = verify(str(damaged("folded", change)), str(untied_llama))
    assert ("folds", NORM) in {(fault.check, fault.tensor) for fault in found.faults}


def test_groups_of_one_value_are_no_fault_of_their_zero_points(tools, tmp_path):
    source = tools.write_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layers" in name:
            signs = torch.where(torch.rand(len(tensor), 1) < 0.5, 1, -1)
            tensor[:, : tensor.shape[1] // 2] = tensor[:, :1].abs() * signs
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for form in ("awq", "compressed-tensors", "gptq"):
        settings = ["quantize.group_size=32", "quantize.symmetric=false", f"export.format={form}"]
        quantize(make_plan(open_checkpoint(str(source)), load("rtn-w4", settings)), tmp_path / form)
        for original in (None, str(source)):
            found = verify(str(tmp_path / form), original)
            assert found.sound, said(found)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01, in the source 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, "rope_theta is 7.0"),
        ({"eos_token_id": 7}, "eos_token_id is 7"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 64"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"pad_token_id": 5000}, "pad_token_id"),
    ],
)
def test_a_config_that_changes_the_function_is_told(change, what, sound, untied_llama, tmp_path):
    folder = Path(shutil.copytree(sound("plain"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    (folder / "outlierq.json").unlink()
    assert what in said(verify(str(folder), str(untied_llama)))


def test_another_tokenizer_template_or_end_of_text_is_told(sound, untied_llama, tmp_path):
    def edited(name, edit):
        folder = Path(shutil.copytree(sound("plain"), tmp_path / "copy"))
        (folder / "outlierq.json").unlink()
        edit(folder / name)
        found = verify(str(folder), str(untied_llama))
        shutil.rmtree(folder)
        return said(found)

    def reversed_ids(path):
        content = json.loads(path.read_text())
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
        path.write_text(json.dumps(content))

    def beyond(path):
        content = json.loads(path.read_text())
        content["model"]["vocab"]["zzz"] = 5000
        path.write_text(json.dumps(content))

    assert "have another id than in the source" in edited("tokenizer.json", reversed_ids)
    assert "has ids up to 5000, but the embedding has 260 rows" in edited("tokenizer.json", beyond)
    assert "the chat template is not that of the source" in edited(
        "chat_template.jinja", lambda path: path.write_text("{{ messages }}")
    )

    def another_end(path):
        path.write_text(path.read_text().replace('"eos_token_id": 2', '"eos_token_id": 9'))

    assert "eos_token_id is 9" in edited("generation_config.json", another_end)


def test_experts_that_pruning_left_are_known_without_statistics(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    from outlierq.pipeline.remodel.prune import pruned
    from outlierq.registry import transform_method

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4, num_experts_per_tok=1)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    source = open_checkpoint(str(tmp_path / "source"))
    kept = {"0": [0, 3], "1": [1, 2]}
    smaller = pruned(source, transform_method("reap"), {"ratio": 0.5}, experts=kept)
    assert smaller.survivors == kept
    name = "model.layers.1.block_sparse_moe.experts.1.w1.weight"
    assert torch.equal(smaller.read(name), source.read(name.replace("experts.1", "experts.2")))


def test_diff_knows_what_folds_and_rotations_changed(sound, untied_llama):
    source = open_checkpoint(str(untied_llama))
    for kind in ("folded", "rotated"):
        result = open_checkpoint(str(sound(kind)))
        for found in (diff(source, result), diff(result, source)):
            errors = [change.relative_error for change in found.changed]
            assert errors and max(errors) < 0.15, found.changed[0]
            assert NORM in found.moved and not {"model.norm.weight"} & {change.name for change in found.changed}


def test_without_a_report_folds_are_guessed_only_where_gains_show_them(sound, untied_llama, tmp_path):
    folder = Path(shutil.copytree(sound("folded"), tmp_path / "foreign"))
    (folder / "outlierq.json").unlink()
    found = verify(str(folder), str(untied_llama))
    assert found.sound and any("as folds make them" in note for note in found.notes), said(found)
    shutil.rmtree(folder)
    folder = Path(shutil.copytree(sound("plain"), tmp_path / "foreign"))
    (folder / "outlierq.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{SITE}.weight_scale"] *= 4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"{SITE}.weight" in said(verify(str(folder), str(untied_llama)))


@pytest.mark.parametrize("kind", RECIPES)
def test_without_a_report_folds_shifts_rotations_and_orders_are_inferred(kind, sound, untied_llama, tmp_path):
    folder = Path(shutil.copytree(sound(kind), tmp_path / "unreported"))
    (folder / "outlierq.json").unlink()
    found = verify(str(folder), str(untied_llama))
    assert found.sound, said(found)
    assert max(found.errors.values()) < 0.3, "judged against the source as it is"


def test_an_error_other_than_the_recorded_one_is_told():
    findings = Findings()
    check_error("w", 0.1000, 0.1000, 1e-3, findings)
    assert findings.faults == []
    check_error("w", 0.1010, 0.1000, 1e-3, findings)
    assert "the report says 0.1" in findings.faults[0].what
