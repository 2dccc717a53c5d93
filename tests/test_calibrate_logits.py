"""The sample of final logits against the whole model run the usual way."""

from __future__ import annotations

import pytest
import torch
import transformers

from outlierq.calibrate.logits import sample_logits, sample_places
from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.core.errors import NumbersError, SourceError
from outlierq.core.model import Block, Structure

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def through_the_blocks(model, ids):
    """A runner and the hidden states behind the last block."""
    blocks = tuple(Block(i, f"model.layers.{i}", (), ()) for i in range(2))
    asked = []
    runner = BlockRunner(
        model,
        Structure(blocks, (), ()),
        PartWeights(asked.append, asked.append),
        dtype=torch.float32,
        batch_size=2,
    )
    hidden = runner.start(ids)
    for index, block in enumerate(blocks):
        runner.run(model.get_submodule(block.name), index, hidden)
    asked.clear()
    return runner, hidden, asked


@pytest.fixture(params=["LlamaConfig", "Gemma2Config"])
def model(request):
    """Gemma 2 scales its embeddings and caps its logits."""
    torch.manual_seed(0)
    config = getattr(transformers, request.param)(**SMALL)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def test_the_sample_is_of_the_models_own_logits(model):
    ids = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(1))
    runner, hidden, asked = through_the_blocks(model, ids)
    sample = sample_logits(runner, ids, hidden, positions=23, top=10)
    assert asked == ["", ""]
    with torch.no_grad():
        logits = model(ids).logits.double()[sample.sequence.long(), sample.position.long()]
    assert sample.top_ids.shape == (23, 10) and sample.top_ids.dtype == torch.int32
    assert torch.allclose(sample.log_sum_exp.double(), logits.exp().sum(-1).log(), atol=1e-4)
    expected = logits.log_softmax(-1).sort(-1, descending=True)
    assert torch.allclose(sample.top_log_probs.double(), expected.values[:, :10], atol=1e-4)
    found = logits.log_softmax(-1).gather(1, sample.top_ids.long())
    assert torch.allclose(found, expected.values[:, :10], atol=1e-4)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    assert not model.lm_head._forward_pre_hooks


def test_a_short_text_and_a_small_vocabulary_are_kept_whole(model):
    ids = torch.arange(6).view(2, 3)
    runner, hidden, _ = through_the_blocks(model, ids)
    sample = sample_logits(runner, ids, hidden)
    assert sample.top_ids.shape == (6, 96)
    assert torch.allclose(sample.top_log_probs.exp().sum(-1), torch.ones(6), atol=1e-5)


def test_places_are_spread_over_sequences_and_drawn_by_seed():
    places = sample_places((7, 50), 40, seed=0)
    assert len({tuple(place) for place in places.tolist()}) == 40
    counts = places[:, 0].bincount(minlength=7)
    assert counts.min() >= 5 and counts.max() <= 6 and places[:, 1].max() < 50
    assert torch.equal(places, sample_places((7, 50), 40, seed=0))
    assert not torch.equal(places, sample_places((7, 50), 40, seed=1))


def test_logits_that_are_not_finite_are_refused(model):
    ids = torch.arange(6).view(2, 3)
    runner, hidden, _ = through_the_blocks(model, ids)
    hidden.values[1, 2] = float("nan")
    with pytest.raises(NumbersError, match="96 of 576 logits are NaN or Inf in batch 0"):
        sample_logits(runner, ids, hidden)


def test_a_model_without_a_head_is_refused():
    model = transformers.LlamaModel(transformers.LlamaConfig(**SMALL)).eval()
    holder = torch.nn.Module()
    holder.model, holder.forward = model, lambda **options: model(**options)
    ids = torch.arange(6).view(2, 3)
    runner, hidden, _ = through_the_blocks(holder, ids)
    with pytest.raises(SourceError, match="Module returns no logits"):
        sample_logits(runner, ids, hidden)
