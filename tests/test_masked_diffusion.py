"""Masked-diffusion models are calibrated and judged on text of which a part is hidden, as they read it."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import write_llama
from masked_models import MASK, with_mask_token, write_masked_llama, write_own_code

from outlierq.core.masking import Hidden, hidden_at_random, sees_later_tokens
from outlierq.evaluate.divergence import measure, model_sees_later_tokens, prediction_shift
from outlierq.load import load_model, open_checkpoint, study
from outlierq.pipeline.block.stats_run import token_set
from outlierq.recipe import Calibration

SHORT = {"samples": 6, "sequence_length": 32, "text": "embedded"}
SETTINGS = [part for name, value in SHORT.items() for part in ("--set", f"calibration.{name}={value}")]
EVAL = ("--text", "embedded", "--windows", "4", "--window-length", "48")


@pytest.fixture(scope="module")
def masked_llama(tmp_path_factory):
    return write_masked_llama(tmp_path_factory.mktemp("models") / "masked-llama")


@pytest.fixture(scope="module")
def loaded(masked_llama):
    return load_model(open_checkpoint(str(masked_llama)))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 250, (6, 40), generator=torch.Generator().manual_seed(1))


# What is hidden.


def test_windows_hide_from_one_token_to_nearly_all_and_never_how_they_begin():
    ids = torch.zeros(64, 41, dtype=torch.long)
    hidden = hidden_at_random(ids, 259, opening=2, seed=3)
    counts = hidden.places.sum(1)
    assert counts.min() == 1 and counts.max() == 38 and not hidden.places[:, :2].any()
    assert abs(hidden.places[:, 2:].float().mean() - 0.5) < 0.02
    assert abs(hidden.places[:8, 2:].float().mean() - 0.5) < 0.2, "few windows see all shares, too"
    assert torch.equal(hidden.over(ids) == 259, hidden.places)


def test_what_is_hidden_depends_on_the_seed_alone(ids):
    one, same, other = (hidden_at_random(ids, 259, 1, seed).places for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


# Who sees later tokens is found by asking the model.


def test_a_causal_model_does_not_see_later_tokens_and_a_masked_one_does(tiny_llama, loaded, ids):
    causal = load_model(open_checkpoint(str(tiny_llama)))
    assert model_sees_later_tokens(loaded, ids) and not model_sees_later_tokens(causal, ids)


def test_what_the_last_token_changes_behind_itself_does_not_count():
    assert not sees_later_tokens(lambda ids: ids[..., None].float(), torch.arange(8)[None])


# Calibration.


def test_a_masked_model_calibrates_on_hidden_text_and_no_other_does(masked_llama, tiny_llama, tmp_path):
    causal = with_mask_token(_copied(tiny_llama, tmp_path), mask_token_id=259)
    seen = {}
    for name, folder in (("masked", masked_llama), ("causal", causal)):
        model = study(open_checkpoint(str(folder)))
        seen[name] = token_set(model, Calibration(**SHORT))
    assert seen["masked"].masked and not seen["causal"].masked
    hidden = seen["masked"].ids == 259
    assert hidden.any(1).all() and not hidden[:, 0].any() and hidden.float().mean() < 0.9
    assert torch.equal(seen["masked"].ids[~hidden], seen["causal"].ids[~hidden])
    assert seen["masked"].fingerprint != seen["causal"].fingerprint


def _copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "with-mask-token")


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel"])
def test_a_model_with_code_of_its_own_is_quantized_and_judged(auto_class, outlierq, tmp_path):
    folder, out = write_own_code(tmp_path / "model", auto_class), str(tmp_path / "out")
    own = ("--trust-remote-code",)
    made = outlierq(
        "quantize", str(folder), "-r", "gptq-w4", "-o", out, *SETTINGS, "--set", "quantize.group_size=32", *own
    )
    assert made.code == 0, made.err
    report = json.loads((tmp_path / "out" / "outlierq.json").read_text())
    assert "behind its mask token" in json.dumps(report)
    answer = outlierq("eval", out, "--reference", str(folder), *EVAL, *own, "--json")
    measured = json.loads(answer.out)["divergence"]
    assert measured["hidden_behind"] == MASK and 0 < measured["kl_per_token"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    ["rtn-w8", "w8a8-static", "smoothquant-w8a8", "fp8-dynamic", "awq-w4", "nvfp4", "mxfp4-w4a4", "rotate-w4a4"],
)
def test_a_masked_model_goes_through_every_kind_of_number(recipe, masked_llama, outlierq, tmp_path):
    width = ["--set", "quantize.group_size=32"] if recipe == "awq-w4" else []
    made = outlierq("quantize", str(masked_llama), "-r", recipe, "-o", str(tmp_path / "out"), *SETTINGS, *width)
    assert made.code == 0, made.err
    answer = outlierq("eval", str(tmp_path / "out"), "--reference", str(masked_llama), *EVAL, "--json")
    assert json.loads(answer.out)["divergence"]["kl_per_token"] < 0.5


# Evaluation.


class Before(torch.nn.Module):
    """Says at every place what a model says at the next one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, use_cache):
        output = self.model(input_ids=input_ids, use_cache=False)
        output.logits = output.logits.roll(-1, 1)
        return output


class Copies(torch.nn.Module):
    """Knows every token of a text, and says it at its place."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def forward(self, input_ids, use_cache):
        shown = ((self.ids == input_ids) | (input_ids == 259)).all(1).nonzero()[0, 0]
        return SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(self.ids[shown], 260)[None].float())


def test_figures_of_hidden_tokens_equal_a_plain_computation(loaded, ids):
    hidden = hidden_at_random(ids, 259, 1)
    changed = _noisy(loaded)
    measured = measure(changed, ids, reference=loaded, hidden=hidden)
    assert measured.tokens == hidden.places.sum()
    nll, kl = [], []
    with torch.no_grad():
        for row, places in zip(ids, hidden.places, strict=True):
            given = row.masked_fill(places, 259)[None]
            where = places.nonzero().flatten()
            logp, before = (
                m(input_ids=given).logits[0, where - measured.shift].double().log_softmax(-1) for m in (changed, loaded)
            )
            nll.append(-logp.gather(-1, row[where][:, None]).mean())
            kl.append((before.exp() * (before - logp)).sum(-1).mean())
    assert measured.perplexity == pytest.approx(torch.stack(nll).mean().exp().item(), rel=1e-5)
    assert measured.kl_per_token == pytest.approx(torch.stack(kl).mean().item(), rel=1e-4)


def _noisy(model):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return changed


def test_where_a_hidden_token_is_predicted_is_seen(ids):
    hidden = hidden_at_random(ids, 259, 1)
    assert prediction_shift(Copies(ids), ids, hidden) == 0 and prediction_shift(Before(Copies(ids)), ids, hidden) == 1
    sure = measure(Before(Copies(ids)), ids, hidden=hidden)
    assert sure.shift == 1 and sure.perplexity < 1.05


def test_all_of_a_window_may_be_hidden_but_its_first_token(loaded, ids):
    places = torch.ones_like(ids, dtype=torch.bool)
    places[:, 0] = False
    assert measure(loaded, ids, hidden=Hidden(places, 259)).tokens == 6 * 39


def test_a_masked_model_is_not_asked_to_continue_a_text(masked_llama, outlierq):
    answer = outlierq("eval", str(masked_llama), *EVAL, "--generate")
    assert answer.code == 1 and "fills in hidden ones" in answer.err


# Bad input.


@pytest.mark.parametrize("command", ["eval", "quantize"])
def test_a_mask_token_that_the_tokenizer_lacks_is_refused_with_its_own(command, masked_llama, outlierq, tmp_path):
    folder = _copied(masked_llama, tmp_path)
    with_mask_token(folder, mask_token_id=4000)
    rest = ["-r", "gptq-w4", "-o", str(tmp_path / "out"), *SETTINGS] if command == "quantize" else [*EVAL]
    answer = outlierq(command, str(folder), *rest)
    assert answer.code == 1 and "4000" in answer.err and "set mask_token_id in config.json to 259" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_sees_later_tokens_and_has_no_mask_token_is_not_judged_by_the_next_one(tmp_path, outlierq):
    answer = outlierq("eval", str(write_llama(tmp_path / "model", is_causal=False)), *EVAL)
    assert answer.code == 1 and "sees later tokens" in answer.err and "mask_token_id" in answer.err
