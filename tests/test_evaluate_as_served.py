"""Windows begin as the tokenizer begins a text, and both sides of a comparison read a text as the same tokens."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from outlierq.core.errors import OutlierqError
from outlierq.core.windows import opening_tokens
from outlierq.evaluate import tokens
from outlierq.evaluate.divergence import text_windows
from outlierq.load import load_tokenizer, open_checkpoint
from outlierq.pipeline.measuring.measure import Measurement, measure
from outlierq.pipeline.measuring.models import checked_windows, load_for_evaluation

SMALL = Measurement(windows=2, window_length=32)
BOS = 1


def change_tokenizer(folder: Path, change) -> Path:
    """The folder after `change` was applied to the content of its tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def with_template(*before: str, after: tuple[str, ...] = ()):
    """A change that lets a tokenizer put special tokens around every text."""

    def change(content):
        pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
        pieces += [{"Sequence": {"id": "A", "type_id": 0}}]
        pieces += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
        numbers = content["model"]["vocab"]
        special = {token: {"id": token, "ids": [numbers[token]], "tokens": [token]} for token in (*before, *after)}
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special,
        }  # fmt: skip

    return change


def reversed_vocabulary(content) -> None:
    """A change that gives every token but the special ones another id."""
    vocabulary = content["model"]["vocab"]
    names = [name for name, number in vocabulary.items() if number > 2]
    vocabulary |= dict(zip(names, reversed([vocabulary[name] for name in names]), strict=True))


@pytest.fixture
def begun(llama_copy) -> Path:
    """The tiny model with a tokenizer that begins every text with <s>."""
    return change_tokenizer(llama_copy, with_template("<s>"))


class TestOpening:
    """What stands before every text is found by asking the tokenizer."""

    @pytest.mark.parametrize(
        ("before", "after", "opening"),
        [((), (), []), (("<s>",), (), [1]), (("<s>", "<unk>"), ("</s>",), [1, 0]), ((), ("</s>",), [])],
    )
    def test_the_opening_is_what_the_tokenizer_puts_before_a_text(self, llama_copy, before, after, opening):
        change_tokenizer(llama_copy, with_template(*before, after=after))
        assert opening_tokens(load_tokenizer(open_checkpoint(str(llama_copy)))) == opening

    def test_every_window_has_the_opening_and_the_stream_of_the_text_goes_on(self, begun):
        checkpoint = open_checkpoint(str(begun))
        windows = checked_windows(checkpoint, load_tokenizer(checkpoint), "abcdefghi", window_length=4)
        assert windows.opening == "<s>" and windows.ids.shape == (3, 4) and (windows.ids[:, 0] == BOS).all()
        bare = checked_windows(checkpoint, load_tokenizer(checkpoint), "abcdefghi", window_length=4, bos=False)
        assert bare.opening == "" and bare.ids.shape == (2, 4)
        assert torch.equal(windows.ids[:, 1:].flatten()[:8], bare.ids.flatten())

    def test_a_window_without_room_for_text_is_refused(self, begun):
        checkpoint = open_checkpoint(str(begun))
        with pytest.raises(OutlierqError, match="no room for text"):
            text_windows(load_tokenizer(checkpoint), "abc", 1, None, [BOS])

    def test_the_figures_are_those_of_the_begun_windows(self, begun, tiny_llama):
        result = measure(open_checkpoint(str(begun)), open_checkpoint(str(begun)), SMALL)
        assert result["divergence"]["opening"] == "<s>" and result["conditions"]["bos"] is True
        checkpoint = open_checkpoint(str(begun))
        from outlierq.calibrate.text.embedded import embedded_text

        ids = checked_windows(
            checkpoint, load_tokenizer(checkpoint), embedded_text("evaluation"), windows=2, window_length=32
        ).ids
        with torch.inference_mode():
            logits = load_for_evaluation(checkpoint)(ids).logits[:, :-1].log_softmax(-1)
        nll = -logits.gather(-1, ids[:, 1:, None]).mean()
        assert result["divergence"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)

    def test_bare_windows_are_another_question(self, begun, tmp_path, monkeypatch):
        monkeypatch.setenv("OUTLIERQ_CACHE", str(tmp_path / "cache"))
        checkpoint = open_checkpoint(str(begun))
        bare = Measurement(windows=2, window_length=32, bos=False)
        served, without = measure(checkpoint, None, SMALL), measure(checkpoint, None, bare)
        assert served["from_cache"] == without["from_cache"] == []
        assert without["divergence"]["opening"] == "" and without["conditions"]["bos"] is False
        assert without["divergence"]["perplexity"] != served["divergence"]["perplexity"]
        assert measure(checkpoint, None, SMALL)["divergence"] == served["divergence"]

    def test_the_command_and_the_card_say_how_windows_begin(self, outlierq, begun, tmp_path):
        out = tmp_path / "out"
        size = ("-s", "gate.windows=2", "-s", "gate.window_length=32")
        assert outlierq("quantize", begun, "-r", "rtn-w4", "-o", out, "--max-kl", "9", *size).code == 0
        words = ("eval", out, "--reference", begun, "--windows", "2", "--window-length", "32")
        assert "each begun with <s> as the tokenizer begins a text" in " ".join(outlierq(*words).out.split())
        assert "begun" not in outlierq(*words, "--no-bos").out
        card = outlierq("publish", out, "me/it", "--base-model", "owner/name", "--dry-run").out
        assert r"each begun with \<s\> as the tokenizer begins a text" in card and "no special tokens" not in card


class TestTokenizers:
    """A comparison of two models with different tokenizers is refused, with the first difference."""

    @pytest.fixture
    def other(self, tiny_llama, tmp_path) -> Path:
        return Path(shutil.copytree(tiny_llama, tmp_path / "other"))

    def test_another_vocabulary_is_named(self, outlierq, tiny_llama, other):
        change_tokenizer(other, reversed_vocabulary)
        for words in [
            ("eval", other, "--reference", tiny_llama, "--max-kl", "9"),
            ("compare", tiny_llama, other, "--quality"),
        ]:
            answer = outlierq(*words)
            assert answer.code == 1 and "the tokenizers differ: 'Ń' has the id 3 in" in answer.err

    def test_another_beginning_is_named(self, outlierq, tiny_llama, other):
        change_tokenizer(other, with_template("<s>"))
        answer = outlierq("eval", other, "--reference", tiny_llama)
        assert answer.code == 1 and "token 0 of the beginning is 1 ('<s>') in" in answer.err
        assert "and missing in" in answer.err

    def test_other_ids_of_the_text_are_named(self, outlierq, tiny_llama, other):
        def merged(content):
            content["model"]["vocab"]["th"] = 259
            content["model"]["merges"] = [["t", "h"]]

        change_tokenizer(other, merged)
        answer = outlierq("eval", tiny_llama, "--reference", other)
        assert answer.code == 1 and "of the text is" in answer.err and "259 ('th') in" in answer.err

    def test_tokens_that_the_text_does_not_use_may_be_added(self, outlierq, tiny_llama, other):
        def padded(content):
            content["model"]["vocab"]["<padding>"] = 259

        change_tokenizer(other, padded)
        answer = outlierq("eval", other, "--reference", tiny_llama, "--windows", "2", "--window-length", "32")
        assert answer.code == 0, answer.err


def test_two_copies_of_one_tokenizer_are_not_given_the_whole_text(tiny_llama, monkeypatch):
    one, other = (load_tokenizer(open_checkpoint(str(tiny_llama))) for _ in range(2))
    given, ids = [], tokens._ids
    monkeypatch.setattr(tokens, "_ids", lambda tokenizer, text: given.append(text) or ids(tokenizer, text))
    tokens.check_same_tokens(one, other, "abc", ("a", "b"))
    assert given == []
    other.split_special_tokens = True
    with pytest.raises(OutlierqError, match="token 0 of the text"):
        tokens.check_same_tokens(one, other, "<s>", ("a", "b"))
    assert given == ["<s>", "<s>"]
