"""`outlierq calibrate` as a whole: what the folder holds, what a run collects, and that a second use runs nothing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from outlierq.calibrate.collect import ALL_FIELDS, BLOCK_FIELDS, stored_fields
from outlierq.calibrate.runner import BlockRunner
from outlierq.calibrate.stored.stats_file import StatsReader
from outlierq.core.errors import NumbersError, StatsError
from outlierq.load import build_skeleton, find_structure, open_checkpoint, study
from outlierq.pipeline.block.stats import NoStats, StatsFromFile
from outlierq.pipeline.block.stats_run import Asked, StatsFromRun, token_set
from outlierq.pipeline.calibrate import calibrate
from outlierq.recipe import load

SAMPLES, LENGTH = 6, 32


def settings():
    small = [f"calibration.samples={SAMPLES}", f"calibration.sequence_length={LENGTH}", "calibration.batch_size=4"]
    return load("gptq-w4", small).calibration


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    """Statistics of the tiny model. Read-only."""
    path = tmp_path_factory.mktemp("calibrated") / "stats"
    calibrate(open_checkpoint(str(tiny_llama)), settings(), path)
    return path


@pytest.fixture(scope="module")
def ids(tiny_llama) -> torch.Tensor:
    """The tokens that the statistics are of."""
    checkpoint = open_checkpoint(str(tiny_llama))
    return token_set(study(checkpoint), settings()).ids


def source_of(model, work, needs) -> StatsFromRun:
    studied = study(open_checkpoint(str(model)))
    tokens = token_set(studied, settings())
    return StatsFromRun(studied, tokens, settings(), work, asked=Asked(stored_fields(needs)))


def test_everything_is_kept_for_every_group_and_block(folder, ids):
    reader = StatsReader(folder)
    values = json.loads((folder / "stats.json").read_text())
    assert set(values["settings"]["fields"]) == ALL_FIELDS | BLOCK_FIELDS and reader.notes == ()
    for index in reader.indices:
        _, stats = reader.block(index)
        assert len(stats) == 4
        for kept in stats.values():
            assert kept.tensors().keys() == ALL_FIELDS
            assert (kept.log2_histogram.sum(1) == SAMPLES * LENGTH // 3).all()
            places = kept.top_tokens[:, :2].long()
            assert torch.equal(kept.top_tokens[:, 2].long(), ids[places[:, 0], places[:, 1]])
            largest = torch.maximum(-kept.min, kept.max)
            assert kept.top_tokens[0, 4].abs() == largest.max() and largest.argmax() == kept.top_tokens[0, 3]
        block = reader.block_stats(index)
        assert block.tensors().keys() == BLOCK_FIELDS - {"expert_tokens", "expert_saliency"}
        assert block.residual_first.shape == (SAMPLES, 6)
        assert torch.allclose(block.attention_mass.sum(1), torch.ones(4), atol=1e-4)


def test_logits_are_those_of_the_whole_model(folder, tiny_llama, ids):
    from transformers import AutoModelForCausalLM

    sample = StatsReader(folder).logits()
    assert sample.top_ids.shape == (SAMPLES * LENGTH, 260)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits = model(ids).logits.float()[sample.sequence.long(), sample.position.long()]
    assert torch.allclose(logits.logsumexp(-1), sample.log_sum_exp, atol=1e-3)
    found = logits.log_softmax(-1).gather(1, sample.top_ids.long())
    assert torch.allclose(found, sample.top_log_probs, atol=1e-2)


def test_statistics_from_a_file_run_no_forward_pass(folder, tiny_llama, monkeypatch):
    checkpoint = open_checkpoint(str(tiny_llama))
    monkeypatch.setattr(BlockRunner, "__init__", lambda *a, **k: pytest.fail("the model was run"))
    structure = find_structure(checkpoint, build_skeleton(checkpoint))
    source = StatsFromFile(folder, checkpoint, structure, frozenset({"hessian", "key_abs_max"}))
    source.block(1)
    assert source.block_stats(1).key_abs_max.shape == (2, 16)
    assert NoStats(structure).block_stats(0) is None


def test_a_run_collects_of_a_block_only_what_is_asked(folder, tiny_llama, tmp_path):
    reader = StatsReader(folder)
    source = source_of(tiny_llama, tmp_path, {"key_abs_max", "value_abs_max"})
    for index in reader.indices:
        _, stats = source.block(index)
        found, expected = source.block_stats(index), reader.block_stats(index)
        assert stats == {} and found.tensors().keys() == {"key_abs_max", "value_abs_max"}
        assert torch.equal(found.key_abs_max, expected.key_abs_max)
        assert torch.equal(found.value_abs_max, expected.value_abs_max)
        assert source.block_stats(index + 1) is None
        source.finished(index, dict)


def test_a_run_that_asks_for_inputs_alone_watches_no_attention(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "outlierq.pipeline.block.stats_run.BlockObserver", lambda *a, **k: pytest.fail("it was watched")
    )
    source = source_of(tiny_llama, tmp_path, {"abs_max"})
    _, stats = source.block(0)
    assert source.block_stats(0) is None and len(stats) == 4
    assert all(kept.tensors().keys() == {"min", "max"} for kept in stats.values())


def test_names_of_block_statistics_are_known_and_others_refused():
    assert stored_fields({"key_abs_max", "abs_mean"}) == {"key_abs_max", "sum_abs"}
    with pytest.raises(StatsError, match=r"unknown statistics \['key_absmax'\]"):
        stored_fields({"key_absmax"})


def test_lost_logits_are_made_again_without_touching_the_blocks(folder, tiny_llama, tmp_path, tools):
    out = shutil.copytree(folder, tmp_path / "stats")
    (out / "logits.safetensors").unlink()
    before = (out / "block-00000.safetensors").stat().st_mtime_ns
    calibrate(open_checkpoint(str(tiny_llama)), settings(), out)
    assert tools.folder_hashes(out) == tools.folder_hashes(folder)
    assert (out / "block-00000.safetensors").stat().st_mtime_ns == before


def test_a_nan_in_the_head_names_it(untied_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(untied_llama, damaged)
    names = json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"]
    file = damaged / names["lm_head.weight"]
    tensors = load_file(file)
    tensors["lm_head.weight"][3, 5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumbersError, match=r"lm_head\.weight holds 1 NaN or Inf"):
        calibrate(open_checkpoint(str(damaged)), settings(), tmp_path / "stats")


def test_the_size_is_said_beforehand_and_recipes_that_are_named_take_less_room(tiny_llama, outlierq, tmp_path):
    words = ("--samples", 4, "--sequence-length", 32)
    said = outlierq("calibrate", tiny_llama, "-o", tmp_path / "all", *words)
    served = outlierq("calibrate", tiny_llama, "-o", tmp_path / "few", *words, "--serve", "gptq-w4,awq-w4")
    assert said.code == served.code == 0, served.err
    assert "statistics will take up to " in said.err and said.err.index("will take") < said.err.index("calibrate 0/2")
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("all", "few")]
    assert sizes[1] < 0.8 * sizes[0]
    for name in ("gptq-w4", "awq-w4"):
        done = outlierq("quantize", tiny_llama, "-r", name, "--stats", tmp_path / "few", "-o", tmp_path / name, "-q")
        assert done.code == 0, done.err
    other = outlierq("quantize", tiny_llama, "-r", "w8a8-static", "--stats", tmp_path / "few", "-o", tmp_path / "x")
    assert other.code == 1 and "does not hold" in other.err and "calibrate again" in other.err


@pytest.mark.parametrize("recipe", ["best-w4", "rotate-w8a8", "rtn-w8"])
def test_a_recipe_that_statistics_cannot_serve_is_said(tiny_llama, outlierq, tmp_path, recipe):
    answer = outlierq("calibrate", tiny_llama, "-o", tmp_path / "stats", "--serve", recipe)
    assert answer.code == 2 and recipe in answer.err and not (tmp_path / "stats").exists()
