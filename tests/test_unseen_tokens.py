"""Tokens that the calibration text does not hold: how many, which, and that the first block's statistics know them."""

from __future__ import annotations

import pytest
import torch
from conftest import write_llama

from outlierq.calibrate.text.unseen import ordinary_tokens, reads_ids_alone, share_of_unseen, unseen_tokens
from outlierq.calibrate.text.windows import token_windows
from outlierq.core.stats import InputStats
from outlierq.load import load_tokenizer, open_checkpoint, study
from outlierq.pipeline.block.stats_run import UNPROVED, Asked, StatsFromRun, token_set
from outlierq.pipeline.planning.work import NO_SAVINGS, Savings
from outlierq.recipe import load

FIELDS = frozenset({"hessian", "sum_x", "sum_sq", "first_rows", "rows", "min", "max"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two blocks in float32, so that equal sums are equal. Read-only."""
    return write_llama(tmp_path_factory.mktemp("unseen"), dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A text of few bytes, every tenth of which no other stretch holds; the tokenizer knows 256."""
    path = tmp_path_factory.mktemp("text") / "few.txt"
    path.write_text("".join(chr(97 + 7 * i * i % 26 if i % 10 else 33 + i // 32) for i in range(1600)))
    return str(path)


def settings(text: str, *more: str):
    asked = [f"calibration.text={text}", "calibration.samples=6", "calibration.sequence_length=32", *more]
    return load("gptq-w4", asked).calibration


def source(model, text: str, work, *more: str, savings: Savings = NO_SAVINGS, fields=FIELDS) -> StatsFromRun:
    studied, asked = study(open_checkpoint(str(model))), settings(text, *more)
    return StatsFromRun(studied, token_set(studied, asked), asked, work, savings=savings, asked=Asked(fields))


def blocks(run: StatsFromRun) -> list[dict[str, InputStats]]:
    done = []
    for index in range(2):
        done.append(dict(run.block(index)[1]))
        run.finished(index, dict)
    return done


@pytest.fixture(scope="module")
def mixed(model, text, tmp_path_factory) -> list[dict[str, InputStats]]:
    return blocks(source(model, text, tmp_path_factory.mktemp("mixed")))


@pytest.fixture(scope="module")
def plain(model, text, tmp_path_factory) -> list[dict[str, InputStats]]:
    return blocks(source(model, text, tmp_path_factory.mktemp("plain"), "calibration.unseen_tokens=false"))


def test_tokens_that_one_window_alone_holds_count_twice_for_other_kinds_of_text():
    windows = torch.tensor([[1, 2, 2, 3, 1, 3, 1, 3, 1, 3], [1, 3, 1, 1, 3, 3, 3, 1, 1, 3]])
    assert share_of_unseen(windows) == 2 * 2 / 20
    assert share_of_unseen(torch.tensor([[1, 2], [2, 1]])) == 0
    assert share_of_unseen(torch.tensor([[1, 2], [3, 4]])) == 0.5, "of such a text half is the most that is believed"
    assert share_of_unseen(torch.tensor([[1, 2]])) == 0, "one window says nothing of others"


def test_special_tokens_and_rows_that_pad_the_table_are_no_ordinary_tokens(model):
    tokenizer = load_tokenizer(open_checkpoint(str(model)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    assert ordinary_tokens(tokenizer, 260).tolist() == list(range(3, 259))
    assert ordinary_tokens(tokenizer, 100).tolist() == list(range(3, 100))


def test_windows_hold_what_the_text_does_not_and_the_same_ones_for_a_seed(model, text):
    tokenizer = load_tokenizer(open_checkpoint(str(model)))
    ids = token_windows(tokenizer, text, samples=6, sequence_length=32, seed=0).ids
    ids[0, 0] = 100
    unseen = unseen_tokens(tokenizer, ids, 260, [1], seed=0)
    held = unseen.windows[:, 1:]
    assert unseen.skip == 1 and (unseen.windows[:, 0] == 1).all() and unseen.kinds == 256 - len(ids.unique())
    assert not torch.isin(held, ids).any() and len(held.unique()) == 6 * 31 and held.min() >= 3
    assert torch.equal(unseen.windows, unseen_tokens(tokenizer, ids, 260, [1], seed=0).windows)
    assert not torch.equal(unseen.windows, unseen_tokens(tokenizer, ids, 260, [1], seed=1).windows)


def test_that_a_block_reads_ids_alone_is_seen_and_not_assumed():
    windows = torch.tensor([[1, 10, 11, 12], [5, 6, 7, 8], [1, 10, 12, 12]])
    table, place = torch.randn(20, 8), torch.randn(4, 8)
    assert reads_ids_alone(windows, table[windows]) and reads_ids_alone(windows, table[windows] + place)
    smeared = table[windows] + 0.5 * table[windows].roll(1, dims=1)
    assert not reads_ids_alone(windows, smeared) and not reads_ids_alone(windows, torch.ones(3, 4, 8))
    assert not reads_ids_alone(windows, table[windows].movedim(1, 2)), "where tokens lie is not known"


def test_the_first_block_counts_unseen_tokens_by_their_share(model, text, mixed, plain):
    from transformers import AutoModelForCausalLM

    studied = study(open_checkpoint(str(model)))
    unseen = token_set(studied, settings(text)).unseen
    whole, name = AutoModelForCausalLM.from_pretrained(model), "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        first = whole.model.layers[0]
        rows = first.input_layernorm(whole.model.embed_tokens(unseen.windows[:, unseen.skip :])).flatten(0, 1)
    ours, before = mixed[0][name], plain[0][name]
    share = 1 - before.tokens / ours.tokens
    assert share == pytest.approx(unseen.share, abs=0.01)
    expected = (1 - share) * before.hessian + share * rows.T @ rows / len(rows)
    assert torch.allclose(ours.hessian, expected, atol=1e-4)
    assert torch.allclose(ours.mean, (1 - share) * before.mean + share * rows.mean(0), atol=1e-4)
    assert all(torch.equal(getattr(ours, kept), getattr(before, kept)) for kept in ("rows", "first_rows", "min", "max"))


def test_later_blocks_are_of_text_alone(mixed, plain):
    assert mixed[0].keys() == plain[0].keys() and len(mixed[1]) == 4
    assert all(mixed[0][name].tokens > each.tokens for name, each in plain[0].items())
    for name, each in plain[1].items():
        assert mixed[1][name].tokens == each.tokens and torch.equal(mixed[1][name].hessian, each.hessian)


def test_shards_and_several_passes_give_the_same(model, text, mixed, tmp_path):
    (tmp_path / "a").mkdir()
    passes = blocks(source(model, text, tmp_path / "a", savings=Savings(spill_bytes=0, stats_bytes=1)))
    shards = blocks(source(model, text, tmp_path, "calibration.shards=3"))
    for name, each in mixed[0].items():
        assert torch.equal(passes[0][name].hessian, each.hessian) and passes[0][name].tokens == each.tokens
        assert (
            torch.allclose(shards[0][name].hessian, each.hessian, atol=1e-5) and shards[0][name].tokens == each.tokens
        )


def test_inputs_of_a_quantized_run_are_paired_for_unseen_tokens_too(model, text, tmp_path):
    run = source(
        model, text, tmp_path, "calibration.mode=sequential", fields=frozenset({"hessian", "cross", "first_rows"})
    )
    for each in run.block(0)[1].values():
        assert each.tokens > 6 * 32 and not each.cross.any(), "nothing is quantized before the first block"


def test_a_first_block_that_reads_neighbours_keeps_the_statistics_of_text(model, text, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("outlierq.pipeline.block.stats_run.reads_ids_alone", lambda windows, hidden: False)
    run = source(model, text, tmp_path)
    _, stats = run.block(0)
    assert UNPROVED in run.notes
    assert all(torch.equal(stats[name].hessian, each.hessian) for name, each in plain[0].items())


def test_a_run_says_how_many_there_were(model, text):
    studied = study(open_checkpoint(str(model)))
    tokens = token_set(studied, settings(text))
    assert f"; {tokens.unseen.share:.1%} of what the first block sees are the {tokens.unseen.kinds:,}" in tokens.summary
    assert token_set(studied, settings(text, "calibration.unseen_tokens=false")).unseen is None
