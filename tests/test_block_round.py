"""Learned rounding of a block starts from what a quantizer rounded, and ends no worse on text that it did not see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from reference.statistics import correlated_inputs, random_weight
from test_resume import KILLED, SMALL, compress, in_child, result

from outlierq.calibrate import batches
from outlierq.core.errors import RecipeError
from outlierq.core.model import LinearSite
from outlierq.core.notes import collecting
from outlierq.core.rounded_block import RoundedBlock
from outlierq.core.scheme import QuantScheme, gguf_scheme
from outlierq.pipeline.block import learn
from outlierq.pipeline.verify import verify
from outlierq.quantize.block_round import block_round, split
from outlierq.quantize.rtn import rtn
from outlierq.recipe import load

WIDTH, BATCHES = 64, 8
SCHEMES = {
    "symmetric": QuantScheme(3, 32),
    "asymmetric": QuantScheme(3, 32, symmetric=False),
    "per channel": QuantScheme(4, None, scale_dtype="float32"),
    "E4M3 blocks": QuantScheme(8, None, kind="float", block=(48, 48)),
    "NVFP4": QuantScheme(4, 16, kind="float", scales="two-level"),
    "MXFP4": QuantScheme(4, 32, kind="float", scales="power-of-two"),
    "real minima": gguf_scheme("Q4_1"),
}
LEARNING = [
    "calibration.samples=6",
    "calibration.batch_size=1",
    "quantize={method: rtn, bits: 3, group_size: 32}",
    "learn.steps=12",
    "learn.step_tokens=32",
]


def site(name: str) -> LinearSite:
    return LinearSite(name, f"{name}.weight", None, WIDTH, WIDTH, 0)


def two_layers(scheme: QuantScheme, length: int = 32) -> RoundedBlock:
    """A residual block of two linears with a kink between them, rounded one by one."""
    x = correlated_inputs(BATCHES * 32, WIDTH).view(BATCHES, -1, length, WIDTH)
    up, down = site("up"), site("down")
    weights = {up: random_weight(WIDTH, WIDTH), down: random_weight(WIDTH, WIDTH).T.contiguous()}

    def run(values, batch):
        return x[batch] + (x[batch] @ values[up].T).relu() @ values[down].T

    start = {s: rtn(w, None, scheme) for s, w in weights.items()}
    return RoundedBlock(weights, start, BATCHES, run, lambda batch: run(weights, batch))


def error(block: RoundedBlock, made, batches) -> float:
    dense = {s: quantized.dequantize() for s, quantized in made.items()}
    return sum((block.run(dense, b) - block.asked(b)).square().sum().item() for b in batches)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_output_errs_less_on_text_that_learning_did_not_see(name):
    block = two_layers(SCHEMES[name])
    with collecting() as notes:
        made = block_round(block, steps=40)
    held_out = split(BATCHES)[1]
    assert error(block, made, held_out) < error(block, block.start, held_out)
    assert "held-out output error is 0." in notes[-1]
    for each, start in zip(made.values(), block.start.values(), strict=True):
        assert each.codes.dtype == start.codes.dtype and each.scale.dtype == start.scale.dtype
        assert each.codes.float().min() >= each.scheme.code_min and each.codes.float().max() <= each.scheme.code_max


@pytest.mark.parametrize("tune", ["codes", "scales"])
def test_what_shall_not_move_stays_and_equal_seeds_give_equal_bytes(tune):
    block = two_layers(SCHEMES["symmetric"])
    options = {"steps": 16, "tune": tune, "code_reach": 0.3}
    made, again = (block_round(block, **options) for _ in range(2))
    for s, start in block.start.items():
        assert torch.equal(made[s].codes, again[s].codes) and torch.equal(made[s].scale, again[s].scale)
        assert torch.equal(made[s].codes, start.codes) == (tune == "scales")
        assert torch.equal(made[s].scale, start.scale) == (tune == "codes")


def test_what_cannot_be_better_is_given_back():
    block = two_layers(SCHEMES["symmetric"])
    exact = replace(block, asked=lambda b: block.run({s: q.dequantize() for s, q in block.start.items()}, b))
    assert block_round(exact, steps=8) == block.start
    assert block_round(block, steps=0) == block.start


def test_vectors_of_weights_stay_as_they_are():
    block = two_layers(SCHEMES["symmetric"])
    coded = {s: replace(q, scheme=gguf_scheme("IQ4_NL")) for s, q in block.start.items()}
    assert block_round(replace(block, start=coded)) == coded


def test_gradients_that_are_not_finite_end_learning_with_what_was_best():
    block = two_layers(SCHEMES["symmetric"])
    calls = []

    def run(values, batch):
        calls.append(batch)
        return block.run(values, batch) * (torch.nan if len(calls) > 20 and torch.is_grad_enabled() else 1)

    with collecting() as notes:
        made = block_round(replace(block, run=run), steps=40)
    assert "a gradient was not finite" in notes[0] and len(notes) == 2
    assert error(block, made, split(BATCHES)[1]) <= error(block, block.start, split(BATCHES)[1])


def test_a_block_that_cannot_be_differentiated_stays_and_says_so():
    block = two_layers(SCHEMES["symmetric"])
    with collecting() as notes:
        made = block_round(replace(block, run=lambda values, batch: block.run(values, batch).detach()))
    assert made == block.start and "step 0 of 60: the block cannot be differentiated" in notes[0]


def test_first_tokens_are_held_as_often_as_they_count():
    def lost_at_first(counts: float) -> float:
        block = replace(two_layers(SCHEMES["symmetric"], length=2), first_counts=counts)
        dense = {s: quantized.dequantize() for s, quantized in block_round(block, steps=40).items()}
        lost = [(block.run(dense, b) - block.asked(b)) / block.asked(b).norm(dim=-1)[..., None] for b in range(BATCHES)]
        return sum(each[:, 0].square().sum().item() for each in lost)

    assert lost_at_first(1000.0) < 0.95 * lost_at_first(0.0)


@pytest.mark.parametrize("batches", [2, 7, 8, 33])
def test_batches_are_split_into_two_parts_that_share_none(batches):
    learning, held_out = split(batches)
    assert learning and held_out and sorted(learning + held_out) == list(range(batches))


def test_a_run_learns_after_rounding_and_a_killed_one_goes_on(tiny_llama, tmp_path):
    settings = [*SMALL, *LEARNING]
    whole, out = tmp_path / "whole", tmp_path / "out"
    report = compress(tiny_llama, whole, "best-w4", settings)
    learned = [note for note in report.notes if "held-out output error" in note]
    assert len(learned) == len({row.site.split(".")[2] for row in report.rows})
    assert any(row.method == "rtn+block_round" for row in report.rows)
    moment = "after the first block is in the journal"
    assert in_child(moment, compress, tiny_llama, out, "best-w4", settings) == KILLED
    compress(tiny_llama, out, "best-w4", settings)
    assert result(out) == result(whole)


@pytest.mark.parametrize("recipe", ["best-nvfp4", "best-mxfp4"])
def test_blocks_learn_on_inputs_as_the_client_rounds_them(recipe, tiny_llama, tmp_path, monkeypatch):
    changed = []

    def watched(*parts) -> RoundedBlock:
        block = RoundedBlock(*parts)
        asked = block.asked(0).float()
        changed.append(((block.run(block.weights, 0) - asked).norm() / asked.norm()).item())
        return block

    with monkeypatch.context() as patch:
        patch.setattr("outlierq.pipeline.block.learn.RoundedBlock", watched)
        report = compress(tiny_llama, tmp_path / "out", recipe, [*SMALL, "learn.steps=8", "learn.step_tokens=32"])
    assert changed[0] > 0.01  # with weights as they were
    assert sum("held-out output error" in note for note in report.notes) == len(changed)
    assert verify(str(tmp_path / "out"), str(tiny_llama)).sound


@pytest.mark.parametrize("model", ["tiny_llama", "untied_llama"])
def test_products_of_a_16_bit_model_take_short_operands_where_those_are_faster(model, request, tmp_path, monkeypatch):
    source, outputs = request.getfixturevalue(model), []

    def look(block: RoundedBlock, **options):
        outputs.append(block.run(block.weights, 0).detach())
        return dict(block.start)

    monkeypatch.setattr(learn, "method", lambda *name: SimpleNamespace(function=look))
    for fast in (False, True):
        monkeypatch.setattr(batches, "has_bfloat16", lambda fast=fast: fast)
        compress(source, tmp_path / str(fast), "best-w4", [*SMALL, *LEARNING])
    exact, short = outputs[0], outputs[len(outputs) // 2]
    assert exact.dtype == short.dtype == torch.float32
    error = ((exact - short).norm() / exact.norm()).item()
    assert (1e-6 < error < 1e-2) if model == "tiny_llama" else error == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["calibration.mode=static"], "calibration.mode: block_round learns on the inputs behind quantized blocks"),
        (["quantize.activations={bits: 8}"], "calibration.inputs: block_round learns on inputs as they are rounded"),
        (["learn.step=3"], "did you mean 'steps'"),
        (["learn.method=block_rond"], "there is no learn method 'block_rond'"),
    ],
)
def test_what_learning_cannot_do_is_said_of_the_recipe(settings, reason):
    with pytest.raises(RecipeError, match=reason):
        load("best-w4", settings)


def test_too_little_text_to_hold_some_out_is_refused_before_work(tiny_llama, tmp_path):
    with pytest.raises(RecipeError, match="holds a batch of text out of learning, and 4 windows are one batch") as said:
        compress(tiny_llama, tmp_path / "out", "best-w4", [*SMALL, "calibration.samples=4", "calibration.batch_size=4"])
    assert "calibration.samples to 8 or more" in said.value.hint and not (tmp_path / "out").exists()
