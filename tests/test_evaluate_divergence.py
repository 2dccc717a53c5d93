"""Perplexity and KL divergence agree with the plain computation in float64, and name what is broken."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outlierq.core.errors import NumbersError, OutlierqError
from outlierq.evaluate import divergence
from outlierq.evaluate.divergence import measure, text_windows

VOCABULARY = 96


def tiny_llama(seed, blocks=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


class Fixed(torch.nn.Module):
    """Gives the same logits [length, vocabulary] for every window."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(7))


def full_logp(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)


def test_all_figures_equal_a_plain_computation_in_float64(ids):
    model, reference = tiny_llama(1), tiny_llama(2)
    measured = measure(model, ids, reference=reference, batch_size=2)
    logp, reference_logp, target = full_logp(model, ids), full_logp(reference, ids), ids[:, 1:]
    nll = -logp.gather(-1, target[..., None]).squeeze(-1)
    reference_nll = -reference_logp.gather(-1, target[..., None]).squeeze(-1)
    kl = (reference_logp.exp() * (reference_logp - logp)).sum(-1)
    top, reference_top = logp.argmax(-1), reference_logp.argmax(-1)
    assert measured.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert measured.reference_perplexity == pytest.approx(reference_nll.mean().exp().item(), rel=1e-5)
    assert measured.kl_per_token == pytest.approx(kl.mean().item(), rel=1e-5)
    assert measured.kl_standard_error == pytest.approx((kl.mean(-1).std() / 5**0.5).item(), rel=1e-4)
    assert measured.top1_agreement == pytest.approx((top == reference_top).double().mean().item())
    assert measured.flips_to_wrong == int(((reference_top == target) & (top != target)).sum())
    assert measured.flips_to_right == int(((reference_top != target) & (top == target)).sum())
    assert (measured.tokens, measured.windows, measured.window_length) == (5 * 23, 5, 24)


def test_identical_models_have_zero_divergence(ids):
    measured = measure(tiny_llama(1), ids, reference=tiny_llama(1))
    assert measured.kl_per_token == 0
    assert measured.top1_agreement == 1
    assert (measured.flips_to_wrong, measured.flips_to_right) == (0, 0)
    assert measured.perplexity == measured.reference_perplexity


def test_without_a_reference_only_perplexity_is_known(ids):
    measured = measure(tiny_llama(1), ids)
    with_reference = measure(tiny_llama(1), ids, reference=tiny_llama(2))
    assert measured.perplexity == pytest.approx(with_reference.perplexity)
    assert measured.reference_perplexity is None
    assert measured.kl_per_token is None
    assert measured.flips_to_wrong is None


@pytest.mark.parametrize("chunk", [1, VOCABULARY, 7 * VOCABULARY])
def test_chunks_of_positions_do_not_change_the_result(ids, monkeypatch, chunk):
    whole = measure(tiny_llama(1), ids, reference=tiny_llama(2)).to_dict()
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", chunk)
    parts = measure(tiny_llama(1), ids, reference=tiny_llama(2)).to_dict()
    del whole["seconds"], parts["seconds"]
    assert parts.pop("opening") == whole.pop("opening")
    assert parts.pop("hidden_errors") == whole.pop("hidden_errors") and len(whole) > 8
    assert parts == pytest.approx(whole, rel=1e-6)


def test_batch_size_does_not_change_the_result_and_progress_is_told(ids):
    seen = []
    one = measure(tiny_llama(1), ids, reference=tiny_llama(2))
    three = measure(tiny_llama(1), ids, reference=tiny_llama(2), batch_size=3, progress=lambda *done: seen.append(done))
    assert three.kl_per_token == pytest.approx(one.kl_per_token, rel=1e-5)
    assert seen == [(3, 5), (5, 5)]


def test_agreement_and_flips_are_counted_right_on_hand_made_logits():
    ids = torch.tensor([[0, 0, 1, 2, 3]])  # predicted: 0, 1, 2, 3
    reference_top = torch.tensor([0, 1, 0, 3, 0])  # right, right, wrong, right
    model_top = torch.tensor([0, 2, 2, 0, 0])  # right, wrong, right, wrong
    one_hot = torch.eye(4) * 3
    measured = measure(Fixed(one_hot[model_top]), ids, reference=Fixed(one_hot[reference_top]))
    assert measured.top1_agreement == 0.25
    assert measured.flips_to_wrong == 2
    assert measured.flips_to_right == 1
    assert measured.kl_standard_error is None


def test_tokens_that_both_models_rule_out_add_nothing():
    ids = torch.tensor([[0, 1, 2]])
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits, torch.full((3, 2), float("-inf"))], 1)
    other = torch.cat([logits.flip(0), torch.full((3, 2), float("-inf"))], 1)
    plain = measure(Fixed(logits.flip(0)), ids, reference=Fixed(logits))
    assert measure(Fixed(other), ids, reference=Fixed(padded)).kl_per_token == pytest.approx(plain.kl_per_token)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_named_with_their_window(bad):
    class BrokenLater(Fixed):
        def forward(self, input_ids, use_cache):
            output = super().forward(input_ids, use_cache)
            output.logits = output.logits.clone()
            output.logits[input_ids[:, 0] == 3, 1, 2] = bad
            return output

    ids = torch.tensor([[0, 1, 2], [1, 1, 2], [3, 1, 2]])
    with pytest.raises(NumbersError, match="model's logits in window 2"):
        measure(BrokenLater(torch.zeros(3, 4)), ids, batch_size=2)


def test_a_different_vocabulary_is_refused():
    ids = torch.tensor([[0, 1, 2]])
    with pytest.raises(OutlierqError, match="predicts 4 tokens and the reference 5"):
        measure(Fixed(torch.zeros(3, 4)), ids, reference=Fixed(torch.zeros(3, 5)))


def test_windows_beyond_the_models_positions_are_refused():
    with pytest.raises(OutlierqError, match="65 tokens exceed the model's 64"):
        measure(tiny_llama(1), torch.zeros(1, 65, dtype=torch.long))


def test_ids_of_another_tokenizer_are_refused():
    with pytest.raises(OutlierqError, match=f"id {VOCABULARY} does not fit"):
        measure(tiny_llama(1), torch.full((1, 8), VOCABULARY))


def test_the_models_mode_is_put_back(ids):
    model = tiny_llama(1).train()
    measure(model, ids[:1], reference=tiny_llama(2))
    assert model.training


class Letters:
    """A tokenizer that gives one id per character."""

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_windows_are_one_stream_without_overlap():
    assert text_windows(Letters(), "abcdefgh", 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert text_windows(Letters(), "abcdefgh", 3, windows=1).tolist() == [[97, 98, 99]]


@pytest.mark.parametrize(("text", "windows", "need"), [("ab", None, "1 windows of 3 need 3"), ("abcdef", 3, "need 9")])
def test_a_text_that_is_too_short_is_refused_with_its_size(text, windows, need):
    with pytest.raises(OutlierqError, match=f"the text has {len(text)} tokens.*{need}"):
        text_windows(Letters(), text, 3, windows)


def test_the_error_of_hidden_states_is_told_block_by_block():
    reference, model = tiny_llama(1), tiny_llama(1)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    ids = torch.randint(3, VOCABULARY - 1, (3, 16))
    measured = measure(model, ids, reference=reference)
    assert len(measured.hidden_errors) == 2 and measured.hidden_errors[0] == 0 < measured.hidden_errors[1]
    states: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    for name, each in (("before", reference), ("after", model)):
        handle = each.model.layers[1].register_forward_hook(
            lambda _, __, output, name=name: states[name].append(output)
        )
        each(ids)
        handle.remove()
    before, after = (torch.cat([o if torch.is_tensor(o) else o[0] for o in states[name]]) for name in states)
    expected = ((after - before).square().sum() / before.square().sum()).item()
    assert measured.hidden_errors[1] == pytest.approx(expected, rel=1e-3)
    assert measure(model, ids).hidden_errors == ()


def test_models_with_other_blocks_have_no_common_depth():
    ids = torch.randint(3, VOCABULARY - 1, (2, 16))
    measured = measure(tiny_llama(1), ids, reference=tiny_llama(1, blocks=3))
    assert measured.hidden_errors == () and measured.kl_per_token > 0
