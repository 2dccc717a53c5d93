"""Turns that are seen or learned of a model change nothing when merged, and help on text that they did not see."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from test_rotate import GEMMA, GPT2, LLAMA, SANDWICH, TIED, WIDE, difference, logits, proved, save

from outlierq.core.errors import NumbersError, RecipeError
from outlierq.core.notes import collecting
from outlierq.core.scheme import ActivationScheme
from outlierq.load import load_model, open_checkpoint
from outlierq.ops.activations import fake_quantize, rounded_by_its_scale
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.remodel.anatomy import find_anatomy
from outlierq.pipeline.remodel.rewritten import TURNS_NAME, RewrittenCheckpoint
from outlierq.pipeline.turning import made
from outlierq.recipe import load, parse
from outlierq.registry import transform_method
from outlierq.transform.rotations import learning
from outlierq.transform.rotations.klt import klt
from outlierq.transform.rotations.learning import Pace, cayley_step, learn, skew_of, without_mean
from outlierq.transform.rotations.merging import identity_turns, merged
from outlierq.transform.rotations.ostquant import ostquant, womi
from outlierq.transform.rotations.spinquant import spinquant
from outlierq.transform.rotations.turnable import RESIDUAL, SCALE, VALUES, Turnable, kind_of

MAMBA = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "expand": 2, "conv_kernel": 4}
MAMBA2 = {**MAMBA, "num_heads": 6, "head_dim": 16, "n_groups": 2, "chunk_size": 8}
# name -> (config class, its arguments, kinds of turns that the model allows)
FAMILIES = {
    "llama, tied": ("LlamaConfig", {**LLAMA, **TIED}, {RESIDUAL, VALUES, SCALE}),
    "qwen2, biases": ("Qwen2Config", LLAMA, {RESIDUAL, VALUES, SCALE}),
    "qwen3, norms of queries and keys": ("Qwen3Config", {**WIDE, **TIED}, {RESIDUAL, VALUES, SCALE}),
    "gemma, 1 + w": ("GemmaConfig", {**WIDE, **TIED}, {RESIDUAL, VALUES, SCALE}),
    "phi3, fused": ("Phi3Config", {**LLAMA, "pad_token_id": 0}, {RESIDUAL, VALUES, SCALE}),
    "gpt2, LayerNorm": ("GPT2Config", GPT2, {RESIDUAL, VALUES, SCALE}),
    "mamba": ("MambaConfig", MAMBA, {RESIDUAL, SCALE}),
    "mamba2, gated norm": ("Mamba2Config", MAMBA2, {RESIDUAL, SCALE}),
}


def random_turns(possible, keeps_mean: bool) -> dict[str, torch.Tensor]:
    """Turns of every kind, far from the identity. Scales are powers of two, so that new gains are exact."""
    generator = torch.Generator().manual_seed(0)
    turns = {}
    for name, each in possible.items():
        noise = torch.randn(each.shape, generator=generator, dtype=torch.float64)
        skew = noise - noise.mT if kind_of(name) != SCALE else noise
        if kind_of(name) == SCALE:
            turns[name] = 2.0 ** noise.sign()
        else:
            turns[name] = cayley_step(each, without_mean(skew) if keeps_mean and name == RESIDUAL else skew)
    return turns


@pytest.mark.parametrize("name", FAMILIES)
def test_random_turns_of_every_kind_keep_float32_logits_within_one_in_ten_thousand(name, tmp_path):
    config_class, arguments, kinds = FAMILIES[name]
    original = save(tmp_path, config_class, arguments)
    checkpoint = open_checkpoint(str(tmp_path))
    anatomy = find_anatomy(checkpoint)
    turns = random_turns(identity_turns(anatomy), keeps_mean="LayerNorm" in name)
    assert ("scale.1.backbone.layers.1.mixer.out_proj" in turns) == ("gated norm" in name)
    assert {kind_of(turn) for turn in turns} == kinds
    changed = RewrittenCheckpoint(checkpoint, merged(anatomy, turns), "turned")
    assert difference(logits(load_model(changed)), logits(original)) <= 1e-4
    assert any(not torch.equal(changed.read(n), checkpoint.read(n)) for n in checkpoint.tensors)


def test_each_kind_of_turn_can_stand_alone_and_one_that_is_not_orthogonal_stops_the_run(tmp_path):
    save(tmp_path, "LlamaConfig", LLAMA)
    checkpoint = open_checkpoint(str(tmp_path))
    anatomy = find_anatomy(checkpoint)
    turns = random_turns(identity_turns(anatomy), keeps_mean=False)
    for kinds in ([RESIDUAL], [VALUES], [SCALE], [RESIDUAL, SCALE]):
        some = {name: each for name, each in turns.items() if kind_of(name) in kinds}
        assert proved(RewrittenCheckpoint(checkpoint, merged(anatomy, some), "turned")) <= 1e-4
    wrong = {name: each * 1.01 if kind_of(name) == VALUES else each for name, each in turns.items()}
    with pytest.raises(NumbersError, match="changed its float32 logits"):
        proved(RewrittenCheckpoint(checkpoint, merged(anatomy, wrong), "turned"))


def toy(keeps_mean: bool = False) -> Turnable:
    """Tokens of 32 channels in 8 batches, a few of them large; the loss is the error of int4 per token."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    x = torch.rand(8, 64, 32, generator=generator).sub(0.5) * torch.linspace(0.5, 1, 32) @ basis
    scheme = ActivationScheme(bits=4)

    def loss(turns, batches):
        turned = x[list(batches)] @ turns[RESIDUAL][0].float()
        if "scale.0.down" in turns:
            turned = turned / turns["scale.0.down"].float()
            return (((rounded_by_its_scale(turned, scheme) - turned) * turns["scale.0.down"].float()) ** 2).mean()
        return (rounded_by_its_scale(turned, scheme) - turned).square().mean()

    def gradient(turns, batches):
        leaves = {name: each.clone().requires_grad_() for name, each in turns.items()}
        value = loss(leaves, batches)
        value.backward()
        return value.item(), {name: leaf.grad for name, leaf in leaves.items()}

    moments = torch.einsum("btc,btd->cd", x.double(), x.double())[None]
    start = {RESIDUAL: torch.eye(32, dtype=torch.float64)[None], "scale.0.down": torch.ones(32, dtype=torch.float64)}
    return Turnable(
        start, keeps_mean, True, 8, lambda t, b: float(loss(t, b)), gradient, lambda _: moments, lambda _: moments
    )


@pytest.mark.parametrize("method", [spinquant, ostquant])
def test_what_is_learned_is_orthogonal_and_better_on_held_out_text_than_every_start(method):
    model = toy()
    with collecting() as notes:
        turns = method(model, steps=40, step_size=0.05)
    matrix = turns[RESIDUAL][0]
    assert torch.allclose(matrix @ matrix.T, torch.eye(32, dtype=torch.float64), atol=1e-10)
    random_signs = spinquant(model, steps=0)
    assert model.loss(turns, [7]) < 0.99 * min(model.loss(random_signs, [7]), model.loss(model.start, [7]))
    assert "KL of rounded inputs on held-out text: as it is " in notes[0]
    assert torch.equal(turns[RESIDUAL], method(model, steps=40, step_size=0.05)[RESIDUAL])


def test_steps_that_make_it_worse_leave_the_best_start():
    model = toy()
    turns = spinquant(model, steps=8, step_size=30.0)
    starts = [model.loss(spinquant(model, steps=0), [7]), model.loss(model.start, [7])]
    assert model.loss(turns, [7]) <= min(starts)


def test_steps_that_lead_far_astray_are_taken_back_and_shortened_until_they_help(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    skew = 0.002 * torch.randn(1, 32, 32, generator=generator, dtype=torch.float64)
    start = torch.eye(32, dtype=torch.float64)[None]
    target = cayley_step(start, skew - skew.mT)

    def gradient(turns, batches):
        return 1.0, {RESIDUAL: turns[RESIDUAL] - target}

    def loss(turns, batches):
        return 1e-4 + float((turns[RESIDUAL] - target).square().mean())

    near = Turnable({RESIDUAL: start}, False, True, 8, loss, gradient, lambda _: start, lambda _: start)
    found = learn(near, {"near": {RESIDUAL: start}}, Pace(40, 0.5))
    assert loss(found, [7]) < 0.99 * loss(near.start, [7])
    monkeypatch.setattr(learning, "ASTRAY", math.inf)
    assert torch.equal(learn(near, {"near": {RESIDUAL: start}}, Pace(40, 0.5))[RESIDUAL], start)


def test_a_gradient_that_is_not_finite_stops_learning_with_a_note():
    model = toy()
    broken = replace(model, gradient=lambda turns, batches: (float("nan"), dict(turns)))
    with collecting() as notes:
        turns = spinquant(broken, steps=8)
    assert notes[0] == "stopped at step 0: the gradient is not finite"
    assert model.loss(turns, [7]) <= model.loss(model.start, [7])


def test_behind_the_eigenvectors_of_the_inputs_every_channel_has_the_same_variance():
    model = toy()
    moments = model.moments(RESIDUAL)[0]
    for turns in (klt(model), womi(model, [RESIDUAL], seed=0)):
        energy = (turns[RESIDUAL][0].T @ moments @ turns[RESIDUAL][0]).diagonal()
        assert energy.max() / energy.min() < 1 + 1e-9
    random_signs = spinquant(model, steps=0, values=False)[RESIDUAL][0]
    energy = (random_signs.T @ moments @ random_signs).diagonal()
    assert energy.max() / energy.min() > 1.1


def test_eigenvectors_are_refused_for_layer_norm_and_learned_rotations_keep_its_mean():
    model = toy(keeps_mean=True)
    with pytest.raises(RecipeError, match="LayerNorm"):
        klt(model)
    ones = torch.ones(32, dtype=torch.float64)
    for method in (spinquant, ostquant):
        assert torch.allclose(ones @ method(model, steps=10)[RESIDUAL][0], ones, atol=1e-9)


def test_eigenvectors_are_refused_where_no_hadamard_matrix_fits_and_blocks_of_one_are_noted():
    def of(width: int) -> Turnable:
        moments = torch.eye(width, dtype=torch.float64)[None]
        return replace(toy(), start={RESIDUAL: moments}, moments=lambda name: moments)

    with pytest.raises(RecipeError, match="no Hadamard matrix fits 49 channels"):
        klt(of(49))
    with collecting() as notes:
        klt(of(188))
    assert notes == ["channels get the same energy only within each of 47 blocks of 4"]


def test_a_step_of_cayleys_transform_is_orthogonal_however_large():
    noise = torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.eye(24, dtype=torch.float64).expand(2, -1, -1)
    skew = skew_of(one, 100 * noise)
    assert torch.equal(skew, -skew.mT)
    turned = cayley_step(one, skew)
    assert torch.allclose(turned @ turned.mT, one, atol=1e-10)
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.allclose((x @ turned[0]).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    "scheme",
    [
        ActivationScheme(bits=4),
        ActivationScheme(bits=8, per="tensor"),
        ActivationScheme("float", 8),
        ActivationScheme(bits=8, per="group", group_size=16),
        ActivationScheme("float", 4, per="group", group_size=32, scales="power-of-two"),
        ActivationScheme("float", 4, dynamic=False, per="group", group_size=16, scales="two-level"),
    ],
    ids=str,
)
def test_rounding_with_gradients_rounds_as_without(scheme):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = rounded_by_its_scale(x, scheme)
    assert torch.allclose(rounded, fake_quantize(x.detach(), scheme), atol=1e-6)
    rounded.sum().backward()
    assert x.grad.isfinite().all()
    if scheme.scales == "plain" and scheme.per != "tensor":  # what the scale holds answers for the errors of all
        largest = x.detach().abs().argmax(-1, keepdim=True)
        assert not torch.allclose(x.grad.gather(-1, largest), torch.ones(6, 1))


# In a run.

QUICK = [
    "calibration.samples=8",
    "calibration.sequence_length=32",
    "quantize.group_size=32",
    "transform.0.seed=0",
]


@pytest.mark.parametrize("recipe", ["spinquant-w4a4", "ostquant-w4a4", "klt-w4a4"])
def test_a_turned_model_is_written_verified_and_held_against_its_source(recipe, tiny_llama, outlierq, tmp_path):
    out = tmp_path / "out"
    steps = [] if recipe.startswith("klt") else ["--set", "transform.0.steps=4"]
    settings = [word for each in QUICK for word in ("--set", each)]
    run = outlierq("quantize", tiny_llama, "-r", recipe, "-o", out, "-q", *settings, *steps)
    assert run.code == 0, run.err
    assert (out / TURNS_NAME).is_file() and not out.with_name("out.turns").exists()
    notes = json.loads((out / "outlierq.json").read_text())["notes"]
    assert any("the rewritten model's float32 logits differ by" in note for note in notes)
    assert any("the residual stream of" in note for note in notes)
    assert any("KL of rounded inputs on held-out text" in note for note in notes) == bool(steps)
    assert outlierq("verify", out, "--source", tiny_llama).code == 0
    (out / TURNS_NAME).unlink()
    answer = outlierq("verify", out, "--source", tiny_llama)
    assert answer.code == 1 and TURNS_NAME in answer.out + answer.err


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("spinquant-w4a4", ["quantize.activations=null", "quantize.overrides=[]"], "this recipe rounds none"),
        ("klt-w4a4", ["transform.0.residual=0.5"], "transform.0"),
        ("klt-w4a4", ["transform=[klt, rotate]"], "nothing else may rewrite it"),
        ("klt-w4a4", ["calibration=null", "quantize.method=rtn"], "klt lets the model run over its text"),
        ("ostquant-w4a4", ["transform.0={method: ostquant, residual: false, values: false, scales: false}"], "are off"),
    ],
)
def test_what_cannot_be_turned_is_refused_before_work(recipe, settings, said, tiny_llama, outlierq, tmp_path):
    words = [word for each in [*QUICK[:3], *settings] for word in ("--set", each)]
    answer = outlierq("quantize", tiny_llama, "-r", recipe, "-o", tmp_path / "out", "-q", *words)
    assert answer.code == 1 and said in answer.err
    assert not (tmp_path / "out").exists()


def test_a_model_of_which_nothing_can_be_turned_is_refused_with_the_reason(tmp_path):
    save(tmp_path, "Gemma2Config", GEMMA)
    recipe = parse("calibration: {}\ntransform: [{method: klt, values: false}]\nexport: {format: dense}")
    with pytest.raises(RecipeError, match=f"klt changes nothing: the residual stream is left as it is: .*{SANDWICH}"):
        make_plan(open_checkpoint(str(tmp_path)), recipe)


def test_statistics_and_a_ceiling_of_memory_are_refused_before_the_model_runs(tiny_llama, outlierq, tmp_path):
    words = ("-r", "klt-w4a4", "-o", tmp_path / "out", "-q")
    answer = outlierq("quantize", tiny_llama, *words, "--stats", tmp_path)
    assert answer.code == 1 and "klt rewrites the whole model; the statistics" in answer.err
    answer = outlierq("quantize", tiny_llama, *words, "--max-memory", "1GiB")
    assert answer.code == 1 and "klt has no ceiling of memory" in answer.err


def test_a_run_that_was_stopped_goes_on_with_the_turns_that_it_made_unless_something_changed(
    tiny_llama, tmp_path, monkeypatch
):
    checkpoint, out = open_checkpoint(str(tiny_llama)), tmp_path / "out"
    recipe = load("klt-w4a4", QUICK)
    file = made.turns_for(checkpoint, recipe, out)
    content = file.read_bytes()
    monkeypatch.setattr(made, "_made", lambda *given: pytest.fail("the model ran again"))
    assert made.turns_for(checkpoint, recipe, out) == file and file.read_bytes() == content
    for again in ({"restart": True}, {}):
        other = recipe if again else load("klt-w4a4", [*QUICK[:3], "transform.0.seed=1"])
        with pytest.raises(pytest.fail.Exception, match="ran again"):
            made.turns_for(checkpoint, other, out, **again)
    monkeypatch.undo()
    assert made.turns_for(checkpoint, recipe, out, restart=True).read_bytes() == content


def test_a_plan_has_the_right_sizes_and_cannot_be_followed(tiny_llama, tmp_path):
    plan = make_plan(open_checkpoint(str(tiny_llama)), load("spinquant-w4a4", QUICK))
    assert plan.checkpoint.tensors["lm_head.weight"].shape == plan.checkpoint.tensors["model.embed_tokens.weight"].shape
    with pytest.raises(RecipeError, match="is known once it has run over the calibration text"):
        quantize(plan, tmp_path / "out")


def test_every_turner_has_a_switch_for_each_kind_of_turn_it_makes():
    for name in ("spinquant", "ostquant", "klt"):
        assert {"residual", "values"} <= transform_method(name).options.keys()
    assert parse("calibration: {}\ntransform: [klt]\nexport: {format: dense}").turning
