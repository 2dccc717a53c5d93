"""Scales, gains and biases of a finished checkpoint tuned against its original: never worse, codes as they were."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import outlierq
from outlierq.calibrate.end_loss import EndLoss
from outlierq.core.errors import NumbersError, OutlierqError
from outlierq.core.scheme import ActivationScheme
from outlierq.load import served, study, unpacked
from outlierq.ops.activations import fake_quantize
from outlierq.pipeline.tuning.kept import KeptState
from outlierq.pipeline.tuning.moving import moving_of
from outlierq.pipeline.tuning.running import How, tunable
from outlierq.quantize.tune import Tunable, tune

SIZES = {"samples": 16, "sequence_length": 32, "step_tokens": 64, "device": "cpu"}
slow = partial(pytest.param, marks=pytest.mark.slow)
EVERYTHING = frozenset({"scales", "norms", "biases"})


@pytest.fixture(scope="module")
def w3(tiny_llama, tmp_path_factory) -> Path:
    """The tiny model in 3 bits. Read-only."""
    out = tmp_path_factory.mktemp("w3") / "w3"
    settings = {"quantize.group_size": 32, "quantize.bits": 3}
    outlierq.quantize(tiny_llama, "rtn-w4", out=out, settings=settings, device="cpu")
    return out


@pytest.fixture(scope="module")
def tuned(tiny_llama, w3, tmp_path_factory):
    """That model after six steps, and what was said of them. Read-only."""
    out = tmp_path_factory.mktemp("tuned") / "t"
    return out, outlierq.tune(w3, tiny_llama, out=out, steps=6, **SIZES)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    one, other = tensors_of(before), tensors_of(after)
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_it_diverges_less_on_text_that_no_step_saw_and_only_scales_and_gains_have_changed(tiny_llama, w3, tuned):
    out, said = tuned
    assert said.improved and said.after < 0.97 * said.before and said.steps == 6
    names = changed(w3, out)
    assert {name.rpartition(".")[2] for name in names} == {"weight_scale", "weight"}
    assert {name for name in names if name.endswith(".weight")} == {n for n in tensors_of(w3) if "norm" in n}
    before, after = (outlierq.evaluate(each, tiny_llama, windows=8, window_length=64).kl for each in (w3, out))
    assert after < before


def test_what_comes_out_is_verified_against_its_source_and_a_gain_that_went_farther_is_found(
    tiny_llama, tuned, tmp_path
):
    out, said = tuned
    verification = outlierq.verify(out, source=tiny_llama)
    assert verification.sound, verification.faults
    assert all(row.method == "rtn+tune" and row.output_error is None for row in said.report.rows)
    assert said.report.record["tune"]["kl"] == [said.before, said.after]
    copy = shutil.copytree(out, tmp_path / "copy")
    content = json.loads((copy / "outlierq.json").read_text())
    content["record"]["tune"]["moved"]["model.norm.weight"] /= 4
    (copy / "outlierq.json").write_text(json.dumps(content))
    faults = outlierq.verify(copy, source=tiny_llama).faults
    assert {"model.norm.weight", "outlierq.json"} == {fault.tensor for fault in faults}


@pytest.mark.parametrize("stops", [4, slow(1)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(tiny_llama, w3, tuned, tmp_path, monkeypatch, stops):
    keep, left = KeptState.keep, [stops]

    def stopping(kept, state):
        keep(kept, state)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptState, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        outlierq.tune(w3, tiny_llama, out=tmp_path / "t", steps=6, **SIZES)
    assert not (tmp_path / "t").exists()
    with pytest.raises(OutlierqError, match="another tuning"):
        outlierq.tune(w3, tiny_llama, out=tmp_path / "t", steps=5, **SIZES)
    again = outlierq.tune(w3, tiny_llama, out=tmp_path / "t", steps=6, **SIZES)
    assert not changed(tuned[0], tmp_path / "t") and again.losses == tuned[1].losses
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == sorted(p.name for p in tuned[0].iterdir())


def test_where_no_step_helps_all_bytes_stay_and_it_is_said(tiny_llama, w3, tmp_path, outlierq):
    sizes = ("--samples", 16, "--sequence-length", 32, "--steps", 2, "--step-size", 3)
    answer = outlierq("tune", w3, "--reference", tiny_llama, "-o", tmp_path / "t", *sizes, "--device", "cpu")
    assert answer.code == 0 and "no step helped" in answer.out, answer.err
    assert not changed(w3, tmp_path / "t")
    assert outlierq("verify", tmp_path / "t", "--source", tiny_llama).code == 0
    notes = json.loads((tmp_path / "t" / "outlierq.json").read_text())["notes"]
    assert any("no step helped on the held-out part" in note for note in notes)


@pytest.mark.parametrize("trouble", ["not finite", "cannot be differentiated"])
def test_a_gradient_that_cannot_be_had_ends_tuning_with_one_line(tiny_llama, w3, tmp_path, monkeypatch, trouble):
    def refuse(end, batches):
        raise NumbersError(f"the model {trouble}")

    monkeypatch.setattr(EndLoss, "gradient", refuse)
    said = outlierq.tune(w3, tiny_llama, out=tmp_path / "t", steps=2, **SIZES)
    assert not said.improved and any(trouble in note for note in said.notes)
    assert not changed(w3, tmp_path / "t")


def test_gradients_are_those_of_the_divergence(tiny_llama, w3, tmp_path):
    packed = study(unpacked(outlierq.open(w3)))
    moving, _ = moving_of(packed, EVERYTHING)
    ids = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(3))
    how = How(2, "float32", "cpu", tmp_path, lambda event: None)
    with tunable(study(served(outlierq.open(tiny_llama))), packed, moving, ids, how) as model:
        generator = torch.Generator().manual_seed(1)
        here = {name: 0.1 * torch.randn(each.shape, generator=generator) for name, each in model.start.items()}
        loss, gradients = model.gradient(here, [0, 1])
        assert loss == pytest.approx(model.loss(here, [0, 1]), rel=1e-5)
        for kind in ("scales", "norms"):
            names = [name for name, each in moving.items() if each.kind == kind]
            steps = {name: torch.randn(here[name].shape, generator=generator) for name in names}
            foretold = sum(float((gradients[name] * step).sum()) for name, step in steps.items())
            beside = [
                model.loss(here | {name: here[name] + far * step for name, step in steps.items()}, [0, 1])
                for far in (1e-3, -1e-3)
            ]
            assert (beside[0] - beside[1]) / 2e-3 == pytest.approx(foretold, rel=0.02)


def test_a_state_worse_than_the_start_sends_tuning_back_and_halves_its_steps():
    def loss(changes, batches):
        return float((changes["a"] - 1e-3).square().sum())

    model = Tunable(
        {"a": torch.zeros(3)}, 8, loss, lambda c, b: (loss(c, b), {"a": 2 * (c["a"] - 1e-3)}), lambda changes: changes
    )
    state = tune(model, steps=24, step_size=0.05)
    assert state.size < 1 and state.began and state.least < state.first


def test_a_change_is_what_is_left_of_it_once_it_is_stored(w3):
    moving, _ = moving_of(study(unpacked(outlierq.open(w3))), EVERYTHING)
    for each in moving.values():
        assert torch.equal(each.stored(each.start), each.values)
        left = each.left(each.start + 0.01)
        assert torch.equal(each.stored(left), each.stored(each.start + 0.01))


@pytest.mark.parametrize(
    "recipe",
    [
        "gptq-format",
        "nvfp4",
        slow("fp8-dynamic"),
        slow("smoothquant-w8a8"),
    ],
)
def test_other_formats_and_checkpoints_without_a_report_are_tuned_too(tiny_llama, tmp_path, recipe):
    settings = {"quantize.group_size": 32} if recipe == "gptq-format" else {}
    name, format = ("rtn-w4", "gptq") if recipe == "gptq-format" else (recipe, None)
    if "smooth" in recipe or recipe == "nvfp4":
        settings |= {"calibration.samples": 4, "calibration.sequence_length": 32}
    outlierq.quantize(tiny_llama, name, out=tmp_path / "q", settings=settings, format=format, device="cpu")
    foreign = recipe == "gptq-format"
    if foreign:
        (tmp_path / "q" / "outlierq.json").unlink()
    said = outlierq.tune(tmp_path / "q", tiny_llama, out=tmp_path / "t", steps=3, step_size=2e-3, **SIZES)
    assert said.after <= said.before
    assert ("scales" in said.moved) == (recipe != "nvfp4")
    assert any("no real numbers" in note for note in said.notes) == (recipe == "nvfp4")
    verification = outlierq.verify(tmp_path / "t", source=tiny_llama)
    assert verification.sound, verification.faults
    assert outlierq.open(tmp_path / "t").config == outlierq.open(tmp_path / "q").config


SMALL = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.08,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", ["GPT2", slow("Gemma2"), slow("Qwen3Moe")])
def test_matrices_stored_across_gains_stored_less_one_and_experts(family, tmp_path, tools):
    import transformers

    sizes = SMALL | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    if family == "GPT2":
        sizes = {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "m")
    tools.write_tokenizer(tmp_path / "m")
    settings = {"quantize.group_size": 32, "quantize.bits": 3}
    outlierq.quantize(tmp_path / "m", "rtn-w4", out=tmp_path / "q", settings=settings, device="cpu")
    said = outlierq.tune(tmp_path / "q", tmp_path / "m", out=tmp_path / "t", steps=4, **SIZES)
    assert said.improved and "norms" in said.moved
    assert (family == "GPT2") == ("biases" in said.moved) == any("rows only" in note for note in said.notes)
    verification = outlierq.verify(tmp_path / "t", source=tmp_path / "m")
    assert verification.sound, verification.faults


def test_rounded_inputs_hand_gradients_on_as_they_are():
    x = torch.randn(3, 8, requires_grad=True)
    rounded = fake_quantize(x, ActivationScheme())
    assert torch.equal(rounded.detach(), fake_quantize(x.detach(), ActivationScheme()))
    rounded.backward(torch.ones_like(x))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_what_cannot_be_tuned_is_refused_in_words_before_work(tiny_llama, w3, tmp_path, tools):
    other = tools.write_llama(tmp_path / "other", seed=1)
    wide = tools.write_llama(tmp_path / "wide", intermediate_size=128)
    for reference, words in ((other, "was not made of"), (wide, "was not made of")):
        with pytest.raises(OutlierqError, match=words):
            outlierq.tune(w3, reference, out=tmp_path / "t", **SIZES)
    with pytest.raises(OutlierqError, match="is not compressed"):
        outlierq.tune(tiny_llama, tiny_llama, out=tmp_path / "t", **SIZES)
    with pytest.raises(OutlierqError, match="windows are too few"):
        outlierq.tune(w3, tiny_llama, out=tmp_path / "t", samples=7)
    with pytest.raises(OutlierqError, match="'codes' cannot be tuned"):
        outlierq.tune(w3, tiny_llama, out=tmp_path / "t", kinds=["codes"])
    assert not (tmp_path / "t").exists() and not list(tmp_path.glob("*.partial"))


def test_what_was_tuned_is_tuned_again_and_still_verified(tiny_llama, tuned, tmp_path):
    said = outlierq.tune(tuned[0], tiny_llama, out=tmp_path / "t", steps=2, dtype="bfloat16", **SIZES | {"samples": 8})
    verification = outlierq.verify(tmp_path / "t", source=tiny_llama)
    assert verification.sound, verification.faults
    assert {row.method for row in said.report.rows} == {"rtn+tune"}
    assert said.report.record["tune"]["moved"].keys() == tuned[1].report.record["tune"]["moved"].keys()
