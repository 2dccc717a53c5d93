"""Rotations merged into the weights never change what a model computes, or are refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from outlierq.core.errors import NumbersError, RecipeError, SourceError
from outlierq.load import load_model, open_checkpoint, study
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.remodel import rewrite as rewriting
from outlierq.pipeline.remodel.rewrite import prove_rewrite, rewritten
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint
from outlierq.recipe import Recipe, load, parse
from outlierq.transform.rotate import Anatomy, Rewrite, Spin, rotate

SMALL = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64}
WIDE = {**LLAMA, "head_dim": 16}
GEMMA = {**WIDE, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OPT = {**SMALL, "ffn_dim": 80, "max_position_embeddings": 64, "word_embed_proj_dim": 48}
NEOX = {**SMALL, "intermediate_size": 80, "max_position_embeddings": 64, "attention_bias": True}
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {"vocab_size": 96, "hidden_size": 48, "n_layer": 2, "n_head": 4}
TIED = {"tie_word_embeddings": True}

SANDWICH = "post_attention_layernorm stands between a linear and the residual stream"

# name -> (config class, its arguments, why the residual stream is left alone, or "")
ARCHITECTURES = {
    "llama, grouped heads": ("LlamaConfig", LLAMA, ""),
    "llama, tied": ("LlamaConfig", {**LLAMA, **TIED}, ""),
    "qwen2, biases": ("Qwen2Config", LLAMA, ""),
    "qwen3, norms of queries and keys": ("Qwen3Config", {**WIDE, **TIED}, ""),
    "gemma2": ("Gemma2Config", GEMMA, SANDWICH),
    "gemma3": ("Gemma3TextConfig", GEMMA, SANDWICH),
    "gemma, 1 + w": ("GemmaConfig", {**WIDE, **TIED}, ""),
    "mistral with wide heads": ("MistralConfig", {**WIDE, "sliding_window": 8}, ""),
    "phi3, fused": ("Phi3Config", {**LLAMA, "pad_token_id": 0}, ""),
    "opt": ("OPTConfig", {**OPT, **TIED}, ""),
    "gpt2": ("GPT2Config", GPT2, ""),
    "gpt-neox": ("GPTNeoXConfig", NEOX, ""),
    "cohere, layer norm without bias": ("CohereConfig", LLAMA, ""),
    "bloom": ("BloomConfig", BLOOM, "word_embeddings_layernorm stands between the embeddings and the blocks"),
}
IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(2))
ROTATE = parse("transform: [rotate]\nexport: {format: dense}")


def rotating(**options) -> Recipe:
    """A recipe that only rotates."""
    return parse(json.dumps({"transform": [{"method": "rotate", **options}], "export": {"format": "dense"}}))


def save(folder: Path, config_class: str, arguments: dict, *, uniform: bool = False) -> torch.nn.Module:
    """A random model in a folder. Gains and biases are far from one and zero, as in a trained model."""
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 1 + 0.4 * noise if name.endswith("weight") else 0.3 * noise
        else:
            parameter.data = noise * (1.5 / parameter.shape[-1] ** 0.5)
        if uniform and name == "model.norm.weight":
            parameter.data.fill_(1.5)
    model.save_pretrained(folder)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def proved(checkpoint) -> float:
    """What the check before every run finds."""
    return prove_rewrite(study(checkpoint))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save(folder, "LlamaConfig", {**LLAMA, **TIED})
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    return folder, save(folder, "GPT2Config", GPT2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_in_float32_stay_within_one_in_ten_thousand(name, tmp_path):
    config_class, arguments, obstacle = ARCHITECTURES[name]
    original = save(tmp_path, config_class, arguments)
    checkpoint = rewritten(open_checkpoint(str(tmp_path)), ROTATE)
    assert difference(logits(load_model(checkpoint)), logits(original)) <= 1e-4
    assert proved(checkpoint) <= 1e-4
    notes = "\n".join(checkpoint.notes)
    assert "values of 2 blocks, each head by Hadamard" in notes
    assert ("residual stream by Hadamard 48 = 12 x 4" in notes) == (not obstacle)
    assert obstacle in notes
    changed = [n for n in checkpoint.original.tensors if n in checkpoint.rewrite.changes]
    assert all(not torch.equal(checkpoint.read(n), checkpoint.original.read(n)) for n in changed)
    matrices = {n for n, info in checkpoint.tensors.items() if len(info.shape) == 2}
    if obstacle:  # of two blocks only the linears that write and read values
        assert len(matrices & set(changed)) == 4
    else:
        assert matrices <= set(checkpoint.rewrite.changes)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"residual": False}, "v_proj"),
        ({"values": False}, "q_proj"),
        ({"seed": 5}, "q_proj"),
        ({"start": "weights"}, "q_proj"),
    ],
)
def test_every_option_keeps_the_function_and_changes_the_weights(options, kind, llama):
    checkpoint = open_checkpoint(str(llama))
    plain = rewritten(checkpoint, ROTATE)
    other = rewritten(checkpoint, rotating(**options))
    assert proved(other) <= 1e-4
    name = f"model.layers.1.self_attn.{kind}.weight"
    assert not torch.equal(other.read(name), checkpoint.read(name))
    assert any(not torch.equal(plain.read(n), other.read(n)) for n in plain.tensors if n in other.tensors)
    assert len({checkpoint.fingerprint, plain.fingerprint, other.fingerprint}) == 3


def test_from_the_eigenvectors_of_the_weights_every_channel_gets_the_same_energy(llama, gpt2):
    def energy(**options) -> torch.Tensor:
        checkpoint = rewritten(open_checkpoint(str(llama)), rotating(**options))
        readers = [n for n in checkpoint.tensors if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
        readers += [n for n in checkpoint.tensors if n.endswith(("gate_proj.weight", "up_proj.weight"))]
        return sum(checkpoint.read(n).double().square().mean(0) for n in readers)

    usual, even = energy(), energy(start="weights")
    assert even.max() / even.min() < 1.001 < 1.05 < usual.max() / usual.min()
    with pytest.raises(RecipeError, match="LayerNorm"):
        rewritten(open_checkpoint(str(gpt2[0])), rotating(start="weights"))


def test_one_outlier_channel_of_the_stream_becomes_many_small_ones(llama):
    from outlierq.pipeline.remodel.anatomy import Bench, Weights

    checkpoint = rewritten(open_checkpoint(str(llama)), ROTATE)
    model = study(checkpoint)
    bench = Bench(model)

    def ratio(read) -> float:
        hidden = bench.before(Weights(model.names, read)).flatten(0, 1)
        return float((hidden.abs().amax(-1) / hidden.norm(dim=-1)).mean() * hidden.shape[-1] ** 0.5)

    def spiked(name: str, rows: int | None) -> torch.Tensor:
        tensor = checkpoint.original.read(name if name in checkpoint.original.tensors else "model.embed_tokens.weight")
        if name == "model.embed_tokens.weight":
            tensor[:, 7] *= 100
        return tensor[:rows]

    def rotated(name: str, rows: int | None) -> torch.Tensor:
        if name != "model.embed_tokens.weight":
            return spiked(name, rows)
        return checkpoint.rewrite.changes[name].apply(lambda source: spiked(source, rows), torch.float32)

    assert ratio(spiked) > 6 and ratio(rotated) < 3


def test_a_tied_head_gets_its_own_tensor_and_the_plan_says_what_it_costs(llama, tmp_path):
    checkpoint = open_checkpoint(str(llama))
    plan = make_plan(checkpoint, load("rotate-w8a8"))
    assert plan.checkpoint.config["tie_word_embeddings"] is False and checkpoint.config["tie_word_embeddings"] is True
    assert plan.checkpoint.tensors["lm_head.weight"].shape == (96, 48)
    cost = f"{96 * 48 * 4:,} bytes more"
    assert any("lm_head.weight can no longer share" in note and cost in note for note in plan.notes)
    assert plan.source_bytes == sum(info.nbytes for info in checkpoint.tensors.values())


def test_a_head_stays_tied_where_the_last_norm_has_one_gain(tmp_path):
    original = save(tmp_path, "LlamaConfig", {**LLAMA, **TIED}, uniform=True)
    checkpoint = rewritten(open_checkpoint(str(tmp_path)), ROTATE)
    assert "lm_head.weight" not in checkpoint.tensors and "model.norm.weight" not in checkpoint.rewrite.changes
    assert difference(logits(load_model(checkpoint)), logits(original)) <= 1e-4
    assert proved(checkpoint) <= 1e-4


def test_a_layer_norm_model_is_written_for_the_stock_class(gpt2, tmp_path):
    folder, original = gpt2
    out = tmp_path / "out"
    report = quantize(make_plan(open_checkpoint(str(folder)), ROTATE), out)
    stock = transformers.GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32).eval()
    assert difference(logits(stock), logits(original)) <= 1e-4
    for block in stock.transformer.h:
        for norm in (block.ln_1, block.ln_2):
            assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    # The head has no bias that could take the last norm's: it goes through the unused mean of the head's rows.
    assert stock.transformer.ln_f.weight.eq(1).all() and stock.transformer.ln_f.bias.eq(1).all()
    assert stock.transformer.wte.weight.mean(-1).abs().max() < 1e-6
    assert stock.lm_head.weight is not stock.transformer.wte.weight
    assert report.seeds == {"rotate": 0}
    assert any("float32 logits differ by" in note for note in report.notes)


def test_gains_become_one_or_for_offset_norms_zero(tmp_path):
    save(tmp_path, "GemmaConfig", {**WIDE, **TIED})
    checkpoint = rewritten(open_checkpoint(str(tmp_path)), ROTATE)
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert checkpoint.read(name).eq(0).all()


def test_embeddings_of_an_rms_norm_model_keep_their_mean(llama):
    # Centring them, as many programs do, changes the model (methods that fuse LayerNorm need it, RMSNorm forbids it).
    checkpoint = rewritten(open_checkpoint(str(llama)), ROTATE)
    table = "model.embed_tokens.weight"
    norms = checkpoint.original.read(table).norm(dim=-1)
    assert torch.allclose(checkpoint.read(table).norm(dim=-1), norms, rtol=1e-5)


def altered(checkpoint: RewrittenCheckpoint, name: str, **change) -> RewrittenCheckpoint:
    """The same rewrite with one tensor done otherwise."""
    rewrite = checkpoint.rewrite
    changes = {**rewrite.changes, name: replace(rewrite.changes[name], **change)}
    return RewrittenCheckpoint(checkpoint.original, Rewrite(changes, rewrite.notes, rewrite.untied), "altered")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.embed_tokens.weight", {"centred": True}),
        ("model.layers.1.mlp.up_proj.weight", {"norm": None}),
        ("model.layers.0.mlp.down_proj.weight", {"by_output": ()}),
        ("model.layers.1.self_attn.o_proj.weight", {"by_input": ()}),
        ("lm_head.weight", {"by_input": ()}),
    ],
)
def test_a_mistake_in_one_tensor_stops_the_run(name, change, llama):
    checkpoint = altered(rewritten(open_checkpoint(str(llama)), ROTATE), name, **change)
    with pytest.raises(NumbersError, match="rewriting the model changed its float32 logits by"):
        proved(checkpoint)


def test_a_core_used_the_wrong_way_round_stops_the_run(llama, monkeypatch):
    # 48 channels have the non-symmetric core 12; readers with M, writers with M^T is the classic mistake.
    from outlierq.ops import hadamard

    checkpoint = rewritten(open_checkpoint(str(llama)), ROTATE)
    right = hadamard.hadamard_transform

    class Wrong(Spin):
        def __call__(self, x, read):
            signs = self.rotation.signs.to(x.dtype)
            return right(x * signs, transpose=True)

    name = "model.layers.0.mlp.down_proj.weight"
    spin = checkpoint.rewrite.changes[name].by_output[0]
    with pytest.raises(NumbersError, match="changed its float32 logits"):
        proved(altered(checkpoint, name, by_output=(Wrong(spin.rotation, spin.places),)))


def test_a_rewrite_that_fails_its_proof_writes_nothing(llama, tmp_path, monkeypatch):
    plan = make_plan(open_checkpoint(str(llama)), ROTATE)
    wrong = altered(plan.checkpoint, "lm_head.weight", by_input=())
    with pytest.raises(NumbersError, match="float32 logits") as raised:
        quantize(replace(plan, model=replace(plan.model, checkpoint=wrong)), tmp_path / "out")
    assert raised.value.where == "transform on the whole model"
    assert not (tmp_path / "out").exists()


def test_a_model_of_which_nothing_can_be_rotated_is_refused_with_the_reasons(tmp_path):
    save(tmp_path, "Gemma2Config", GEMMA)
    with pytest.raises(
        RecipeError, match=f"rotate changes nothing: the residual stream is left as it is: .*{SANDWICH}"
    ):
        make_plan(open_checkpoint(str(tmp_path)), rotating(values=False))


def test_a_width_without_hadamard_matrix_is_rotated_in_blocks_and_says_so(tmp_path):
    original = save(tmp_path, "LlamaConfig", {**WIDE, "hidden_size": 188})
    checkpoint = rewritten(open_checkpoint(str(tmp_path)), ROTATE)
    assert "47 Hadamard blocks of 4 (188 is no order that can be built)" in checkpoint.notes[0]
    assert difference(logits(load_model(checkpoint)), logits(original)) <= 1e-4


def test_an_odd_width_is_left_alone():
    anatomy = Anatomy(49, tables=("table",))
    with pytest.raises(RecipeError, match="no Hadamard matrix fits 49 channels"):
        rotate(anatomy, values=False)


def test_tensors_that_are_no_plain_numbers_are_not_rotated(llama):
    checkpoint = rewritten(open_checkpoint(str(llama)), ROTATE)
    original = checkpoint.original
    name = "model.layers.0.mlp.up_proj.weight"
    original.tensors[name] = replace(original.tensors[name], dtype="F8_E4M3")
    with pytest.raises(SourceError, match=r"up_proj\.weight is stored as F8_E4M3"):
        RewrittenCheckpoint(original, checkpoint.rewrite, "fp8")


def test_a_large_table_is_rotated_by_pieces(llama, monkeypatch):
    from outlierq.transform import rotate as module

    checkpoint = rewritten(open_checkpoint(str(llama)), ROTATE)
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight")
    whole = [checkpoint.read(name) for name in names]
    monkeypatch.setattr(module, "PIECE_WEIGHTS", 100)
    assert all(torch.equal(checkpoint.read(name), one) for name, one in zip(names, whole, strict=True))


def test_only_some_rows_of_tall_tables_are_proved(llama, monkeypatch):
    from outlierq.pipeline.remodel import anatomy

    checkpoint = rewritten(open_checkpoint(str(llama)), ROTATE)
    monkeypatch.setattr(anatomy, "ROWS", 50)
    seen = []
    after = anatomy.Bench.after
    monkeypatch.setattr(anatomy.Bench, "after", lambda *a: seen.append(after(*a)) or seen[-1])
    assert proved(checkpoint) <= 1e-4
    assert {tuple(found.shape) for found in seen} == {(64, 50)}


# In a run.


def test_statistics_of_the_model_as_it_was_are_refused_with_advice(llama, outlierq, tmp_path, tools):
    tools.write_tokenizer(llama_with_tokenizer := tmp_path / "llama")
    save(llama_with_tokenizer, "LlamaConfig", {**LLAMA, "vocab_size": 260})
    stats = tmp_path / "stats"
    short = ("--samples", "4", "--sequence-length", "32")
    assert outlierq("calibrate", llama_with_tokenizer, "-o", stats, "-q", *short).code == 0
    answer = outlierq(
        "quantize", llama_with_tokenizer, "-r", "rotate-w8a8", "--stats", stats, "-o", tmp_path / "out", "-q"
    )
    assert answer.code == 1
    assert "rotate rewrites the whole model; the statistics" in answer.err and "leave --stats out" in answer.err


def test_statistics_that_do_not_fit_are_refused_before_the_model_runs(tiny_llama, tmp_path, monkeypatch):
    from outlierq.pipeline import quantize as module

    monkeypatch.setattr(module, "prove_rewrite", lambda *given: pytest.fail("the whole model was run first"))
    with pytest.raises(RecipeError, match="rotate rewrites the whole model"):
        quantize(make_plan(open_checkpoint(str(tiny_llama)), load("rotate-w8a8")), tmp_path / "out", stats=tmp_path)


def test_rotation_comes_before_other_transforms_or_the_recipe_is_at_fault():
    with pytest.raises(RecipeError, match=r"transform\.1\.method: rotate rewrites the whole model; it comes before"):
        parse("calibration: {}\ntransform: [awq, rotate]\nquantize: {method: rtn}")
    both = parse("calibration: {}\ntransform: [rotate, awq]\nquantize: {method: rtn}")
    assert [t.method for t in both.rewrites] == ["rotate"] and [t.method for t in both.group_transforms] == ["awq"]


def test_rotation_and_a_scale_search_work_on_one_model(tiny_llama, tmp_path):
    settings = ["calibration.samples=6", "calibration.sequence_length=32", "transform=[rotate, awq]"]
    report = quantize(make_plan(open_checkpoint(str(tiny_llama)), load("awq-w4", settings)), tmp_path / "out")
    assert len(report.transforms) == 8 and all(row["method"] == "awq" for row in report.transforms)
    assert report.seeds == {"calibration": 0, "rotate": 0}
    assert report.fingerprint == open_checkpoint(str(tiny_llama)).fingerprint


def test_four_bit_inputs_mean_in_transformers_what_they_mean_here(tiny_llama, tmp_path, monkeypatch):
    from outlierq.core.scheme import ActivationScheme
    from outlierq.ops import activations

    out = tmp_path / "out"
    chosen = load("rotate-w4a4", ["calibration.samples=6", "calibration.sequence_length=32"])
    quantize(make_plan(open_checkpoint(str(tiny_llama)), chosen), out)

    def rounded(x, scale, scheme):
        return (x / scale).round().clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1) * scale

    # compressed-tensors maps the largest value of a token to 7.5 (127.5), we to 7 (127) as the kernels do.
    monkeypatch.setattr(ActivationScheme, "code_max", property(lambda scheme: 2 ** (scheme.bits - 1) - 0.5))
    monkeypatch.setattr(activations, "round_to_grid", rounded)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert difference(logits(theirs), logits(load_model(open_checkpoint(str(out)), dtype="float32"))) < 1e-5


def test_without_a_rewrite_nothing_is_proved_and_nothing_changes(llama):
    checkpoint = open_checkpoint(str(llama))
    assert rewritten(checkpoint, load("rtn-w4")) is checkpoint
    assert proved(checkpoint) is None
    assert rewriting.rewrite_notes(checkpoint) == []
