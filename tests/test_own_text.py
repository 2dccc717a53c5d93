"""Calibration text that the model itself writes: the same for a seed, kept with its digest, or refused in words."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from outlierq.core.errors import OutlierqError, OutputError, StatsError
from outlierq.evaluate.generation import check_writes, sampled
from outlierq.load import load_model, load_tokenizer, open_checkpoint, study
from outlierq.pipeline.block.stats_run import token_set
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.estimate import estimate
from outlierq.pipeline.text import own
from outlierq.recipe import load

SMALL = ["calibration.text=self", "calibration.samples=6", "calibration.sequence_length=40"]


def settings(*more: str):
    return load("gptq-w4", [*SMALL, *more]).calibration


@pytest.fixture(scope="module")
def model(tiny_llama):
    return study(open_checkpoint(str(tiny_llama)))


@pytest.fixture(scope="module")
def tokens(model):
    return token_set(model, settings())


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """Statistics of text that the tiny model wrote. Read-only."""
    path = tmp_path_factory.mktemp("own") / "stats"
    calibrate(open_checkpoint(str(tiny_llama)), settings(), path, only=frozenset({"hessian"}))
    return path


def test_the_same_seed_gives_the_same_text_and_another_one_another(model, tokens):
    state = torch.get_rng_state()
    again, other = token_set(model, settings()), token_set(model, settings("calibration.seed=1"))
    assert torch.equal(again.ids, tokens.ids) and again.fingerprint == tokens.fingerprint
    assert tokens.ids.shape == (6, 40) and (other.ids != tokens.ids).any() and len(tokens.ids.unique(dim=0)) == 6
    assert torch.equal(torch.get_rng_state(), state), "nobody else's numbers are drawn"


def test_tokens_are_drawn_as_often_as_the_model_predicts_them(tiny_llama):
    writer = load_model(open_checkpoint(str(tiny_llama)))
    first = sampled(writer, torch.ones(4000, 1, dtype=torch.long), 1, 0, 259)[:, 1]
    with torch.no_grad():
        logits = writer(torch.ones(1, 1, dtype=torch.long)).logits[0, 0]
    expected = logits[:259].softmax(0)
    share = first.bincount(minlength=260)[:259] / 4000
    assert (share - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()
    assert first.max() < 259, "rows that pad the head stand for nothing"


def test_the_text_is_kept_beside_the_statistics_and_not_written_again(folder, tiny_llama, model, tokens, monkeypatch):
    kept = json.loads((folder / "own-text.json").read_text())
    ids = torch.tensor(kept["windows"])
    assert torch.equal(ids, tokens.ids) and len(kept["text"]) == 6
    assert kept["sha256"] == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert (
        f"what the model writes (sha256 {kept['sha256'][:12]})"
        in json.loads((folder / "stats.json").read_text())["token_description"]
    )
    monkeypatch.setattr(own, "sampled", lambda *a: pytest.fail("it was written again"))
    again = token_set(model, settings(), folder)
    assert torch.equal(again.ids, tokens.ids) and again.summary == tokens.summary
    calibrate(open_checkpoint(str(tiny_llama)), settings(), folder, only=frozenset({"hessian"}))


def test_text_of_another_seed_is_not_taken_and_a_damaged_one_refused(model, tokens, tmp_path):
    own.keep_tokens(tmp_path, model.checkpoint, settings(), tokens)
    assert own.kept_tokens(tmp_path, model.checkpoint, settings("calibration.seed=1")) is None
    path = tmp_path / "own-text.json"
    values = json.loads(path.read_text())
    for windows in (values["windows"][1:], "none", [[1], [2, 3]], [[1e99]]):
        path.write_text(json.dumps(values | {"windows": windows}))
        with pytest.raises(OutputError, match=r"own-text\.json is damaged"):
            own.kept_tokens(tmp_path, model.checkpoint, settings())


def test_own_text_is_one_source_among_others(model, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 100)
    both = [f"calibration.text=[{{path: self, weight: 2}}, {{path: {tmp_path / 'a.txt'}}}]"]
    ids = token_set(model, settings(*both)).ids
    alone = token_set(model, settings("calibration.samples=4")).ids
    assert torch.equal(ids[:4], alone) and len(ids[4:].unique()) == 10


def test_windows_begin_as_the_tokenizer_begins_a_text(tiny_llama):
    checkpoint = open_checkpoint(str(tiny_llama))
    quiet = SimpleNamespace(device="cpu", listen=lambda event: None)
    tokenizer = load_tokenizer(checkpoint)
    plain = own.Writer(checkpoint, tokenizer, 0, quiet)
    assert plain._starts(3)[0] == 0 and plain._starts(3)[1].tolist() == [[1]] * 3, "behind bos, which is left out"
    tokenizer.bos_token = tokenizer.eos_token = None
    count, starts = own.Writer(checkpoint, tokenizer, 0, quiet)._starts(50)
    assert count == 1 and starts.shape == (50, 1) and len(starts.unique()) > 20


def test_a_model_that_fills_masks_is_refused_before_work():
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    with pytest.raises(OutlierqError, match="BertForMaskedLM does not write from left to right") as caught:
        check_writes(BertForMaskedLM(small))
    assert "calibration.text to mix" in caught.value.hint


def test_a_plan_refuses_a_model_that_cannot_write(tiny_llama, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.can_generate", lambda self=None: False)
    with pytest.raises(OutlierqError, match="does not write from left to right"):
        make_plan(open_checkpoint(str(tiny_llama)), load("gptq-w4", SMALL))


def test_a_plan_counts_the_time_of_writing(tiny_llama, monkeypatch):
    speed = SimpleNamespace(best=1e9, waiting=1.0)
    monkeypatch.setattr("outlierq.pipeline.planning.estimate.measured_speed", lambda: speed)
    seconds = [
        estimate(make_plan(open_checkpoint(str(tiny_llama)), load("gptq-w4", [*SMALL, *more]))).seconds
        for more in ((), ("calibration.text=mix",))
    ]
    assert seconds[0] > seconds[1]


def test_own_text_is_not_written_as_chats(model):
    with pytest.raises(StatsError, match="is written as it comes, not as chats"):
        token_set(model, settings("calibration.chat_template=true"))
