"""Linears that a scheme costs most: predicted with both operands rounded, and kept within a share of the weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight
from test_resume import KILLED, SMALL, in_child, result

import outlierq
from outlierq.core.errors import RecipeError
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.pipeline.fitting.sensitive import Unit, lost, most_costly
from outlierq.recipe import load

NVFP4 = ActivationScheme("float", 4, False, "group", 16, "two-level")
SCHEME = QuantScheme(4, 16, kind="float", scales="two-level", activations=NVFP4)


def unit(weights: int, loss: float, loss_in_fp8: float = 0.0) -> Unit:
    return Unit((), weights, loss, loss_in_fp8)


def test_the_loss_is_that_of_both_operands_and_fp8_loses_far_less():
    x, w = correlated_inputs(256, 128), random_weight(24, 128)
    shares, costs = torch.full((256,), 1 / 256), torch.rand(24) + 0.1
    own, fp8 = lost(w, x, shares, costs, SCHEME)
    weights_only, _ = lost(w, x, shares, costs, QuantScheme(4, 16, kind="float", scales="two-level"))
    assert 0 < fp8 < 0.1 * own and weights_only < own
    assert lost(w, x, shares, 2 * costs, SCHEME)[0] == pytest.approx(2 * own, rel=1e-5)
    relative, _ = lost(w, x, shares, None, SCHEME)
    assert 0.005 < relative / w.numel() < 0.05
    assert lost(w, 2 * x, shares, None, SCHEME)[0] == pytest.approx(relative, rel=1e-3)


def test_what_saves_most_is_kept_and_the_share_never_passed():
    units = [unit(100, 5.0), unit(100, 9.0), unit(700, 9.5), unit(100, 0.0)]
    assert most_costly(units, 0.1) == [1]
    assert most_costly(units, 0.25) == [0, 1]
    assert most_costly(units, 0.05) == []
    for share in (0.1, 0.35, 0.8, 0.95):
        assert sum(units[at].weights for at in most_costly(units, share)) <= share * 1000


def test_fp8_is_taken_where_16_bits_save_little_more():
    assert unit(1, 1.0, 0.05).is_enough_in_fp8 and unit(1, 1.0, 0.05).loss_when_kept == 0.05
    assert not unit(1, 1.0, 0.5).is_enough_in_fp8 and unit(1, 1.0, 0.5).loss_when_kept == 0


def test_auto_nvfp4_keeps_its_share_in_fp8_and_a_killed_run_goes_on(tiny_llama, tmp_path):
    settings = {line.partition("=")[0]: line.partition("=")[2] for line in SMALL} | {"quantize.keep_share": 0.3}
    whole, out = tmp_path / "whole", tmp_path / "out"

    def run(folder) -> None:
        outlierq.quantize(str(tiny_llama), "auto-nvfp4", out=folder, settings=settings, device="cpu")

    run(whole)
    notes = json.loads((whole / "outlierq.json").read_text())["notes"]
    assert re.match(r"quantize.keep_share: [1-8] of 8 layers, .*% of these weights, get FP8 or keep 16 bits", notes[0])
    groups = json.loads((whole / "config.json").read_text())["quantization_config"]["config_groups"].values()
    bits = {(g["weights"]["num_bits"], g["input_activations"]["num_bits"]): g["input_activations"] for g in groups}
    assert bits.keys() == {(4, 4), (8, 8)} and bits[8, 8]["strategy"] == "token" and bits[8, 8]["dynamic"]
    assert not (tmp_path / "whole.sensitive").exists()
    assert in_child("after the first block is in the journal", run, out) == KILLED
    run(out)
    assert result(out) == result(whole)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["transform=[{method: rotate}]"], "rotate rewrites the model"),
        (["quantize.keep_share=1.5"], "less than 1"),
    ],
)
def test_a_share_that_cannot_be_kept_is_refused(settings, words):
    with pytest.raises(RecipeError, match=rf"quantize.keep_share: .*{words}"):
        load("auto-nvfp4", settings)
