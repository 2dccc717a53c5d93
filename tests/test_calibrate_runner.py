"""The block runner: recording, deduplication, spilling, refusals. Architectures are in test_discovery.py."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outlierq.calibrate.collect import Collector, Sequences
from outlierq.calibrate.runner import BlockRunner, HiddenStates, PartWeights, Spill
from outlierq.calibrate.trace import submodule
from outlierq.core.errors import NumbersError, SourceError, StatsError
from outlierq.core.model import Block, InputGroup, LinearSite, Structure

TWO_BLOCKS = Structure(tuple(Block(i, f"layers.{i}", (), ()) for i in range(2)), (), ())


class AddingBlock(torch.nn.Module):
    """Adds to its input in place, and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden_states, mask, *, extra=None, flags=None):
        hidden_states += self.linear(hidden_states) * mask
        return (hidden_states, "weights")


class Toy(torch.nn.Module):
    """A model whose forward can be given bad habits."""

    def __init__(self, habit: str | None = None):
        super().__init__()
        self.habit = habit
        self.embed = torch.nn.Embedding(10, 4)
        self.layers = torch.nn.ModuleList([AddingBlock(), AddingBlock()])

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        mask = torch.ones(input_ids.shape[1], 1)
        flags = UserDict() if self.habit == "shares a container" else (1, None)
        for layer in self.layers[: 1 if self.habit == "stops early" else 2]:
            extra = {"table": [torch.arange(3.0)]}
            if self.habit == "no hidden states":
                hidden = layer(mask=mask, y=hidden)[0]
            else:
                hidden = layer(mask=mask.clone(), hidden_states=hidden, extra=extra, flags=flags)[0]
            if self.habit == "scales between":
                hidden = hidden * 2
        if self.habit == "loops":
            hidden = self.layers[0](mask=mask, hidden_states=hidden)[0]
        return hidden


def runner_of(model, structure=TWO_BLOCKS, **settings) -> BlockRunner:
    weights = PartWeights(settings.pop("materialise", lambda name: None), settings.pop("release", lambda name: None))
    return BlockRunner(model, structure, weights, batch_size=2, **{"dtype": torch.float32, **settings})


def ids(sequences: int = 5, tokens: int = 6) -> torch.Tensor:
    return torch.randint(0, 10, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def test_tuples_keywords_and_blocks_that_change_their_input_are_handled():
    model = Toy()
    runner = runner_of(model)
    hidden = runner.start(ids())
    with torch.no_grad():
        expected = model(ids(), use_cache=False)
    first = hidden.values.clone()
    runner.run(model.layers[0], 0, hidden, replace=False)
    assert torch.equal(hidden.values, first)
    for index, layer in enumerate(model.layers):
        runner.run(layer, index, hidden)
    assert torch.allclose(hidden.values, expected, atol=1e-6)


def test_arguments_that_repeat_are_kept_once():
    runner = runner_of(Toy())
    runner.start(ids(sequences=8))
    assert sum(map(len, runner._known.values())) == 2  # one mask and one table, for 2 blocks, 4 batches and the probe
    assert all(len(record.calls) == 1 and record.of_batch == [0] * 4 for record in runner._records)


def test_containers_that_blocks_write_to_are_kept_for_each_batch():
    runner = runner_of(Toy("shares a container"))
    runner.start(ids(sequences=8))
    first, second = runner._records
    shared = [call.shared[0] for call in first.calls]
    assert len({id(container) for container in shared}) == 4
    assert all(one is other.shared[0] for one, other in zip(shared, second.calls, strict=True))


class HandingBlock(torch.nn.Module):
    """Returns a choice beside the hidden states, which the next block needs."""

    def __init__(self, chooses: bool):
        super().__init__()
        self.linear, self.chooses = torch.nn.Linear(4, 4), chooses

    def forward(self, hidden_states, chosen=None):
        chosen = hidden_states.argmax(-1) if self.chooses else chosen
        return hidden_states + self.linear(hidden_states) * chosen[..., None], chosen, None


class HandingOn(torch.nn.Module):
    """A model in which only the first block chooses."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.layers = torch.nn.ModuleList([HandingBlock(True), HandingBlock(False), HandingBlock(False)])

    def forward(self, input_ids, use_cache):
        hidden, chosen = self.embed(input_ids), None
        for layer in self.layers:
            hidden, chosen, _ = layer(hidden, chosen=chosen)
        return hidden


def handing_on() -> tuple[HandingOn, BlockRunner]:
    model = HandingOn()
    return model, runner_of(model, Structure(tuple(Block(i, f"layers.{i}", (), ()) for i in range(3)), (), ()))


def test_what_a_block_returns_beside_the_hidden_states_reaches_the_next_one():
    model, runner = handing_on()
    hidden = runner.start(ids())
    with torch.no_grad():
        expected = model(ids(), use_cache=False)
    for index, layer in enumerate(model.layers):
        once = runner.run_once(index, hidden)
        assert torch.equal(once(layer), once(layer))
        runner.run(layer, index, hidden, replace=False)  # statistics come first, then the written weights
        runner.run(layer, index, hidden)
    assert torch.allclose(hidden.values, expected, atol=1e-6)
    assert runner.hands_more
    assert len(runner._returned) <= 2 * len(hidden)


def test_a_block_that_takes_over_what_has_not_run_is_named():
    model, runner = handing_on()
    hidden = runner.start(ids())
    with pytest.raises(SourceError, match=r"layers\.1 takes over what the block before it returned"):
        runner.run(model.layers[1], 1, hidden)


def test_weights_are_asked_for_and_given_back_in_order():
    asked = []
    runner = runner_of(
        Toy(), materialise=lambda name: asked.append(f"+{name}"), release=lambda name: asked.append(f"-{name}")
    )
    runner.start(ids())
    assert asked == ["+", "+layers.0", "-layers.0", "-"]


def test_the_model_is_whole_again_after_a_failure():
    model = Toy("no hidden states")
    asked = []
    runner = runner_of(model, release=asked.append)
    with pytest.raises(SourceError, match="without hidden states"):
        runner.start(ids())
    assert asked[-1] == "" and all("forward" not in layer.__dict__ for layer in model.layers)


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("scales between", "changes the hidden states between its blocks, before layers.1"),
        ("stops early", "does not call its block layers.1"),
        ("loops", r"runs its block layers.0 more than once \(2 times\)"),
    ],
)
def test_a_model_that_cannot_run_block_by_block_is_refused(habit, message):
    with pytest.raises(SourceError, match=message):
        runner_of(Toy(habit)).start(ids(), whole=True)


def test_hidden_states_spill_to_a_file_above_the_limit(tmp_path):
    model = Toy()
    plain, spilled = runner_of(model), runner_of(model, spill=Spill(tmp_path, 100))
    kept, mapped = plain.start(ids()), spilled.start(ids())
    assert mapped.spilled and not kept.spilled
    for index, layer in enumerate(model.layers):
        plain.run(layer, index, kept)
        spilled.run(layer, index, mapped)
    assert torch.equal(kept.values, mapped.values)
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_are_read_and_replaced_by_batch():
    hidden = HiddenStates((5, 2, 3), torch.bfloat16, 2)
    hidden.values.zero_()
    hidden.write(2, torch.ones(1, 2, 3))
    assert len(hidden) == 3 and hidden[2].eq(1).all() and hidden[1].eq(0).all() and hidden[1].shape == (2, 2, 3)
    with pytest.raises(IndexError, match="batch 3 of 3"):
        hidden[3]


def test_an_output_that_is_not_finite_names_block_and_batch():
    model = Toy()
    runner = runner_of(model)
    hidden = runner.start(ids())
    hidden.values[2, 0, 0] = float("inf")
    with pytest.raises(NumbersError, match=r"outputs of layers\.1 are NaN or Inf in batch 1") as caught:
        runner.run(model.layers[1], 1, hidden)
    assert caught.value.where == "calibrate on layers.1"


def test_progress_ends_at_one():
    model = Toy()
    runner, seen = runner_of(model), []
    hidden = runner.start(ids(), progress=seen.append)
    runner.run(model.layers[0], 0, hidden, progress=seen.append)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1.0] * 2)


def test_a_run_collects_statistics_on_the_way():
    model = Toy()
    runner = runner_of(model)
    hidden = runner.start(ids())
    expected = hidden.values.reshape(-1, 4).double()
    group = InputGroup("layers.0.linear", (LinearSite("layers.0.linear", "w", None, 4, 4, 0),))
    collector = Collector(model.layers[0], [group], {"sum_x"}, Sequences(6))
    runner.run(model.layers[0], 0, hidden, collector)
    stats = collector.finish()["layers.0.linear"]
    assert stats.tokens == 30 and torch.allclose(stats.sum_x, expected.sum(0), atol=1e-5)  # a sum may be near 0


def test_a_collector_without_a_run_has_no_statistics():
    group = InputGroup("layers.0.linear", (LinearSite("layers.0.linear", "w", None, 4, 4, 0),))
    with pytest.raises(StatsError, match="saw no tokens"):
        Collector(Toy().layers[0], [group], {"sum_x"}, Sequences(6)).finish()


def test_gradients_flow_through_a_recorded_call():
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    blocks = tuple(Block(i, f"model.layers.{i}", (), ()) for i in range(2))
    runner = runner_of(model, Structure(blocks, (), ()))
    hidden = runner.start(ids())
    block = model.model.layers[0]
    runner.run(block, 0, hidden, replace=False)
    block.mlp.up_proj.weight.requires_grad_(True)
    runner.forward(block, 0, 0, hidden[0]).sum().backward()
    assert block.mlp.up_proj.weight.grad.abs().sum() > 0


def test_runs_are_deterministic():
    model = Toy()
    results = []
    for _ in range(2):
        runner = runner_of(model)
        hidden = runner.start(ids())
        results.append(runner.run(model.layers[0], 0, hidden).values.clone())
        once = runner.run_once(0, hidden, seed=3)
        results.append(once(model.layers[0]))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_a_site_that_does_not_exist_is_named():
    with pytest.raises(SourceError, match=r"AddingBlock has no part layers\.0\.missing"):
        submodule(AddingBlock(), "layers.0.missing")
