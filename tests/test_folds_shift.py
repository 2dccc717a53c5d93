"""Shifts of a linear's input: where a bias can carry one, proved on tiny random models and folded without a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fakes import FakeCheckpoint
from test_discovery import ARCHITECTURES, LLAMA, Tiny, build, matches, relative

from outlierq.calibrate.collect import ALL_FIELDS, Collector, Sequences
from outlierq.calibrate.folds import Trial, apply_fold
from outlierq.core.errors import NumbersError
from outlierq.core.model import Fold, InputGroup, LinearSite, TensorInfo
from outlierq.core.move import Move
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.core.stats import InputStats
from outlierq.pipeline.block.fold import carry_out, check_move, choose
from outlierq.registry import method

W8A8 = QuantScheme(8, None, activations=ActivationScheme())
NEMOTRON = {**LLAMA, "attention_bias": True, "mlp_bias": True}
BIASED_LLAMA = {**LLAMA, "attention_bias": True, "mlp_bias": True}

# name -> (config class, arguments, [(sites of the group, whether a shift is absorbed)])
SHIFTS = {
    "opt with relu": (
        *ARCHITECTURES["opt with relu"][:2],
        [("k v q", True), ("out_proj", True), ("fc1", True), ("fc2", False)],
    ),
    "gpt2": (*ARCHITECTURES["gpt2"][:2], [("c_attn", True), ("attn.c_proj", True), ("c_fc", True)]),
    "gpt-neox, parallel": (
        *ARCHITECTURES["gpt-neox, parallel"][:2],
        [("query_key_value", True), ("attention.dense", True), ("dense_h_to_4h", True)],
    ),
    "nemotron with biases, offset layer norm": (
        "NemotronConfig",
        NEMOTRON,
        [("q k v", True), ("o", True), ("up", True)],
    ),
    "llama with biases": (
        "LlamaConfig",
        BIASED_LLAMA,
        [("q k v", False), ("o", True), ("gate up", False), ("down", False)],
    ),
    "qwen2, whose o_proj has no bias": ("Qwen2Config", LLAMA, [("q k v", False), ("o", False)]),
}


@pytest.fixture(scope="module", params=list(SHIFTS))
def shifting(request) -> Tiny:
    return build(*SHIFTS[request.param])


@pytest.fixture(scope="module")
def opt() -> Tiny:
    return build(*SHIFTS["opt with relu"])


def groups_of(tiny: Tiny, index: int = 0) -> list[InputGroup]:
    return tiny.proved(index, tiny.runner.start(tiny.ids))


def test_a_shift_is_admitted_exactly_where_biases_can_carry_it(shifting):
    found = groups_of(shifting)
    for words, admitted in shifting.expected:
        group = next(g for g in found if matches(g, words))
        assert group.fold.shift == admitted, group.fold.shift_note
        assert ("absorbs a shift: output changed by" if admitted else "no shift: ") in group.fold.shift_note


def test_the_reason_why_a_shift_is_left_out_is_named():
    notes = {g.name: g.fold.shift_note for g in groups_of(build(*SHIFTS["llama with biases"]))}
    assert notes["model.layers.0.self_attn.q_proj"] == (
        "no shift: there is no bias beside model.layers.0.input_layernorm.weight to take it off"
    )
    assert "up_proj.bias would change the output by" in notes["model.layers.0.mlp.down_proj"]
    qwen = groups_of(build(*SHIFTS["qwen2, whose o_proj has no bias"]))
    assert [g.fold.shift_note for g in qwen if g.name.endswith("o_proj")] == [
        "no shift: model.layers.0.self_attn.o_proj has no bias to put it back"
    ]


def test_a_shift_through_the_wrong_channels_is_rejected(opt):
    hidden = opt.runner.start(opt.ids)
    trial = Trial(opt.block(0), opt.structure.blocks[0], opt.runner.run_once(0, hidden))
    tried = 0
    for group in groups_of(opt):
        if group.fold and group.fold.shift:
            assert trial.check_shift(group, group.fold).admitted
            wrong = replace(group.fold, index=group.fold.index[1:] + group.fold.index[:1])
            assert trial.check_shift(group, wrong).error > 1e-3
            tried += 1
    assert tried == 3


def test_channels_that_share_a_producer_must_share_their_shift():
    fold = Fold("linear", "v.weight", "v.bias", (0, 1, 0, 1))
    tensors = {"v.weight": torch.ones(2, 3), "v.bias": torch.tensor([1.0, 2.0])}
    scale = torch.tensor([2.0, 4.0, 2.0, 4.0])
    changed = apply_fold(tensors, fold, scale, torch.tensor([3.0, -2.0, 3.0, -2.0]))
    assert changed["v.bias"].tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="2 of 4 channels differ in shift"):
        apply_fold(tensors, fold, scale, torch.tensor([3.0, -2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="no bias to take a shift off"):
        apply_fold(tensors, replace(fold, bias=None), scale, torch.zeros(4))


def with_offsets(tiny: Tiny) -> None:
    """A few channels of every bias far from zero, so that shifts pay."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tiny.model.named_parameters():
        if "layers" in name or ".h." in name:
            if name.endswith("bias") and parameter.dim() == 1:
                chosen = torch.randperm(len(parameter), generator=generator)[:3]
                parameter.data[chosen] += torch.tensor([9.0, -14.0, 6.0])
            parameter.data = parameter.data.bfloat16().float()


def moved(tiny: Tiny, methods: list[str]) -> tuple[dict[str, torch.Tensor], list[dict], dict[str, InputStats]]:
    """Transform every group of every block; the changed tensors, the rows for the report, and the new statistics."""
    hidden = tiny.runner.start(tiny.ids)
    parameters = dict(tiny.model.named_parameters())
    checkpoint = FakeCheckpoint([TensorInfo(n, "BF16", tuple(p.shape), 0) for n, p in parameters.items()])
    steps = [(method("transform", name), {}) for name in methods]
    changed, rows, after = {}, [], {}
    for index, block in enumerate(tiny.structure.blocks):
        groups = tiny.proved(index, hidden)
        collector = Collector(tiny.block(index), groups, ALL_FIELDS - {"top_tokens"}, Sequences(tiny.ids.shape[1]))
        tiny.runner.run(tiny.block(index), index, hidden, collector)
        stats, tensors = collector.finish(), {name: parameters[name].data for name in block.tensors}
        for group in groups:
            choice = choose(group, stats[group.name], W8A8, tensors, steps, checkpoint)
            row = carry_out(group, choice, tensors, steps)
            after[group.name] = stats[group.name].moved(choice.move) if choice else stats[group.name]
            rows.append(row)
            changed |= {name: tensors[name] for name in row["folded"]}
    return changed, rows, after


def put(tiny: Tiny, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in tiny.model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name]


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        *((name, ["os_plus"]) for name in SHIFTS if name != "qwen2, whose o_proj has no bias"),
        ("nemotron with biases, offset layer norm", ["smoothquant", "os_plus"]),
        ("gpt2", ["cheapest_remedy"]),
    ],
)
def test_shifts_and_scales_leave_the_logits_of_the_model(name, methods):
    tiny = build(*SHIFTS[name])
    with_offsets(tiny)
    before = tiny.model(input_ids=tiny.ids).logits
    changed, rows, _ = moved(tiny, methods)
    shifted = [row for row in rows if row.get("shift_max", 0) > 0]
    assert shifted and all(row["choice"] for row in rows if row["fold"])
    put(tiny, changed)
    assert relative(tiny.model(input_ids=tiny.ids).logits, before) < 1e-4


def test_folded_norms_are_exact_in_their_storage_type():
    tiny = build(*SHIFTS["opt with relu"])
    with_offsets(tiny)
    changed, _, _ = moved(tiny, ["os_plus"])
    norms = [name for name in changed if "layer_norm" in name]
    assert len(norms) == 8
    for name in norms:
        stored = changed[name].bfloat16().float()
        assert torch.allclose(stored, changed[name], rtol=1e-5, atol=1e-6), name


def test_the_statistics_after_a_move_are_those_of_the_moved_model():
    tiny = build(*SHIFTS["opt with relu"])
    with_offsets(tiny)
    changed, rows, predicted = moved(tiny, ["os_plus"])
    assert any("shift_max" in row for row in rows)
    put(tiny, changed)
    hidden = tiny.runner.start(tiny.ids)
    groups = tiny.proved(0, hidden)
    collector = Collector(tiny.block(0), groups, {"hessian", "abs_max", "sum_x"}, Sequences(tiny.ids.shape[1]))
    tiny.runner.run(tiny.block(0), 0, hidden, collector)
    for name, found in collector.finish().items():
        expected = predicted[name]
        for field in ("hessian", "min", "max", "sum_x"):
            one, other = getattr(found, field), getattr(expected, field)
            assert (one - other).abs().max() < 1e-3 * one.abs().max(), (name, field)


@pytest.mark.parametrize("damage", ["weight", "bias", "gain", "beta"])
def test_a_move_that_was_carried_out_wrongly_is_caught_without_running_the_model(damage):
    fold = Fold("norm", "norm.weight", "norm.bias", tuple(range(6)), shift=True)
    site = LinearSite("q", "q.weight", "q.bias", out_features=4, in_features=6, block=0)
    group = InputGroup("q", (site,), fold)
    generator = torch.Generator().manual_seed(0)
    before = {
        "norm.weight": torch.rand(6, generator=generator) + 0.5,
        "norm.bias": torch.randn(6, generator=generator),
        "q.weight": torch.randn(4, 6, generator=generator),
        "q.bias": torch.randn(4, generator=generator),
    }
    move = Move(torch.rand(6, generator=generator) + 0.5, torch.randn(6, generator=generator))
    after = {
        **apply_fold(before, fold, move.scale, move.shift),
        "q.weight": before["q.weight"] * move.scale,
        "q.bias": before["q.bias"] + before["q.weight"] @ move.shift,
    }
    check_move(group, move, before, after)
    name = {"weight": "q.weight", "bias": "q.bias", "gain": "norm.weight", "beta": "norm.bias"}[damage]
    broken = after | {name: after[name] + 1e-3 * torch.randn(after[name].shape, generator=generator)}
    with pytest.raises(NumbersError, match=rf"moving the input of q changed {name} by"):
        check_move(group, move, before, broken)
