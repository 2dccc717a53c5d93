"""Tokens that a model has no rows for, and faults in its own code: told in words, before any work where it can be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from outlierq.core.errors import OutlierqError, SourceError, StatsError
from outlierq.core.forward import forward_of
from outlierq.core.windows import check_ids, check_length
from outlierq.load import open_checkpoint, study
from outlierq.pipeline.block.stats_run import token_set
from outlierq.recipe import Calibration

SMALL = Calibration(samples=2, sequence_length=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tools):
    """Tiny Llamas, studied, by what their config says."""

    def made(**config):
        folder = tools.write_llama(tmp_path_factory.mktemp("model") / "source", **config)
        return study(open_checkpoint(str(folder)))

    return made


def test_ids_that_the_tokenizer_has_and_the_model_has_not_are_refused_with_both_sizes(models):
    said = "token id 2[0-9][0-9] does not fit the model's vocabulary of 100; the tokenizer has 259 tokens"
    with pytest.raises(OutlierqError, match=said):
        token_set(models(vocab_size=100), SMALL)


def test_windows_beyond_the_positions_are_refused_before_the_text_is_read(models):
    settings = Calibration(samples=2, sequence_length=32, text="absent.txt")
    with pytest.raises(OutlierqError, match="windows of 32 tokens exceed the model's 16 positions") as caught:
        token_set(models(max_position_embeddings=16), settings)
    assert "calibration.sequence_length" in caught.value.hint


def test_scaled_positions_count_as_the_config_has_them(models):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    model = models(max_position_embeddings=64, rope_parameters=rope).skeleton
    check_length(model, 64, "x")
    with pytest.raises(OutlierqError, match="exceed the model's 64 positions"):
        check_length(model, 65, "x")


def test_negative_ids_are_refused(models):
    model = models().skeleton
    with pytest.raises(OutlierqError, match="token id -1 does not fit the model's vocabulary of 260"):
        check_ids(model, torch.tensor([[3, -1]]))
    check_ids(model, torch.tensor([[0, 259]]))
    check_ids(SimpleNamespace(), torch.tensor([[0, 10**9]]))  # nothing is known of it


@pytest.mark.parametrize("row", [260, -1])
def test_rows_beyond_a_table_are_never_read(models, row):
    checkpoint = models().checkpoint
    with pytest.raises(SourceError, match=f"embed_tokens.weight has 260 rows, and row {row} was asked for"):
        checkpoint.read_some_rows("model.embed_tokens.weight", [0, row])


class Part(torch.nn.Module):
    """A module whose forward raises."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def forward(self, _x):
        raise self.error


def failing(error: Exception) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(Part(error)))


def test_a_fault_in_a_models_code_names_the_module():
    model = failing(IndexError("index out of range in self\nand more"))
    said = "Sequential fails in its own code: IndexError: index out"
    with pytest.raises(OutlierqError, match=said) as caught, forward_of(model, "calibrate"):
        model(1)
    assert caught.value.where == "calibrate on 1.0" and "and more" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError(), StatsError("ours"), OSError("x")])
def test_a_lack_of_memory_and_our_own_errors_pass(error):
    model = failing(error)
    with pytest.raises(type(error)) as caught, forward_of(model, "calibrate"):
        model(1)
    assert caught.value is error
