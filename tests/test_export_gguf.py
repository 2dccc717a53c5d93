"""GGUF files: their blocks hold our codes, and gguf, transformers and our own loader read the same model from them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from libraries import at_least
from transformers import AutoModelForCausalLM, AutoTokenizer

import outlierq as outlierq_package
from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.export.gguf.format import GgufFormat, encode_blocks, ggml_type, gguf_name
from outlierq.export.gguf.header import pre_tokenizer_name
from outlierq.export.writer import compare
from outlierq.load import decode_rows, load_model, open_checkpoint, unpacked
from outlierq.ops.grid import from_groups, in_groups, minmax_grid, to_quant_tensor
from outlierq.ops.search.scale_search import search_grid
from outlierq.pipeline.convert import convert, make_conversion
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

GPTQ_TOO = ["export.format=gptq", "quantize.group_size=32"]  # float16 scales, too
TEXT = "The sea was calm, and 1234 birds slept."


def site(rows: int, columns: int, name: str = "model.layers.0.mlp.up_proj") -> LinearSite:
    return LinearSite(name, f"{name}.weight", None, rows, columns, 0)


def random_weight(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QuantTensor:
    """Any codes, scales and zero points that the scheme allows."""
    make = torch.Generator().manual_seed(seed)
    groups, low, high = scheme.groups(columns), int(scheme.code_min), int(scheme.code_max)
    if scheme.scales == "power-of-two":
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([values, -values])[torch.randint(0, 16, (rows, columns), generator=make)]
        exponent = torch.randint(90, 130, (rows, groups), generator=make)
        return QuantTensor(values.to(torch.float8_e4m3fn), exponent.to(torch.uint8), None, scheme)
    codes = torch.randint(low, high + 1, (rows, columns), generator=make)
    if scheme.scales == "two-level":
        small = torch.randint(0, 64, (2, rows, groups), generator=make).to(torch.uint8)
        units = torch.rand(rows, groups // 8, 2, generator=make).to(torch.float16)
        return QuantTensor(codes.to(torch.uint8), *small, scheme, super_scale=units)
    scale = torch.exp(torch.randn(rows, groups, generator=make) * 2 - 5).to(torch.float16)
    zero = None if scheme.symmetric else torch.randint(0, high + 1, (rows, groups), generator=make).to(torch.uint8)
    return QuantTensor(codes.to(torch.int8 if scheme.symmetric else torch.uint8), scale, zero, scheme)


SCHEMES = [
    QuantScheme(bits, size, symmetric, "float16")
    for bits, symmetric in ((4, True), (4, False), (8, True))
    for size in (32, 96, None)
]
MXFP4 = QuantScheme(4, 32, True, "float16", kind="float", scales="power-of-two")
Q4_K = QuantScheme(4, 32, False, "float16", scales="two-level")


@pytest.mark.parametrize("scheme", [*SCHEMES, MXFP4, Q4_K], ids=str)
def test_gguf_reads_from_our_blocks_what_was_meant(scheme):
    width = 768 if scheme == Q4_K else 192
    meant = random_weight(40, width, scheme)
    found = dequantize(encode_blocks(site(40, width), meant).numpy(), GGMLQuantizationType[ggml_type(scheme)])
    expected = meant.dequantize().numpy()
    if scheme.symmetric or scheme == Q4_K:
        assert np.array_equal(found, expected)
        return
    # m = -zero * scale is rounded to float16: half a unit in its last place.
    width = scheme.columns_per_group(192)
    product = (meant.zero_point.float() * meant.scale.float()).repeat_interleave(width, 1).numpy()
    assert (np.abs(found - expected) <= product * 2**-11 + 2**-25 + 1e-6 * np.abs(expected)).all()
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("scheme", [*SCHEMES, MXFP4, Q4_K], ids=str)
def test_decoding_gives_every_part_back_also_where_rows_are_in_rotary_order(scheme, heads):
    config = {"model_type": "llama" if heads else "qwen2", "num_attention_heads": heads or 4}
    width = 512 if scheme == Q4_K else 192
    linear, format = site(96, width, "model.layers.11.self_attn.q_proj"), GgufFormat(config)
    meant = random_weight(96, width, scheme, seed=1)
    (name, stored), *others = format.encode(linear, meant).items()
    assert name == "blk.11.attn_q.weight" and not others
    assert [(name, "U8", tuple(stored.shape))] == format.tensor_specs(linear, scheme)
    parts = {"weight": stored, **format.row_order(linear)}
    for start, stop in ((0, 96), (32, 96), (64, 72)):
        found = decode_rows("gguf", parts, scheme, (96, width), start, stop)
        compare(name, found, meant.rows(start, stop))  # raises where any part differs


@pytest.mark.parametrize("search", [False, True])
def test_two_level_scales_cost_little_and_are_what_is_stored(search):
    """Sizes of groups differ by 30; a zero row and a zero superblock are there, too."""
    make = torch.Generator().manual_seed(2)
    w = torch.randn(48, 512, generator=make) * torch.exp(1.7 * torch.rand(1, 512, generator=make)) * 0.02
    w[:, 5] *= 5
    w[3], w[5, :256] = 0, 0
    errors = {}
    for scheme in (Q4_K, QuantScheme(4, 32, False, "float16")):
        grid = search_grid(w, scheme, None) if search else minmax_grid(w, scheme)
        rounded = from_groups(grid.round(in_groups(w, scheme)), 512)
        stored = to_quant_tensor(from_groups(grid.encode(in_groups(w, scheme)), 512), grid)
        assert torch.allclose(stored.dequantize(), rounded, rtol=0, atol=1e-7)
        errors[scheme.scales] = ((rounded - w).norm() / w.norm()).item()
    assert errors["two-level"] < 1.05 * errors["plain"] < 0.12
    assert not rounded[3].any() and not rounded[5, :256].any()


def test_blocks_of_another_scheme_are_refused():
    meant = random_weight(8, 64, QuantScheme(4, 32, True, "float16"))
    parts = {"weight": encode_blocks(site(8, 64), meant), "heads": torch.tensor(0)}
    with pytest.raises(SourceError, match="are not int8"):
        decode_rows("gguf", parts, QuantScheme(8, 32, True, "float16"), (8, 64), 0, 8)
    with pytest.raises(SourceError, match="several scales"):
        decode_rows("gguf", parts, QuantScheme(4, 64, True, "float16"), (8, 64), 0, 8)


def test_what_the_format_cannot_hold_is_said():
    format, linear = GgufFormat({}), site(64, 64)
    assert format.obstacle(linear, QuantScheme(8, None, True)) is None
    assert format.approximation(QuantScheme(4, 32, False)) and not format.approximation(QuantScheme(4, 32))
    inputs = ActivationScheme()
    for scheme in (QuantScheme(3, 32), QuantScheme(8, 32, False), QuantScheme(4, 16), QuantScheme(8, None, True)):
        scheme = QuantScheme(8, None, activations=inputs) if scheme == QuantScheme(8, None, True) else scheme
        assert "gguf stores" in format.obstacle(linear, scheme)
    assert "multiple" in format.obstacle(site(64, 48), QuantScheme(8, None))
    with pytest.raises(RecipeError, match="has no name"):
        gguf_name("model.layers.0.strange.weight")


def write_words(folder: Path) -> None:
    """A byte-level BPE tokenizer with merges, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:245]
    tokens = [*["<unk>", "<s>", "</s>"], *alphabet, "th", "the", "Ġs", "Ġse", "ca", "ll"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "s"), ("Ġs", "e"), ("c", "a"), ("l", "l")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def worded_llama(tools, tmp_path_factory) -> Path:
    """A tied model whose tokenizer has merges. Read-only."""
    folder = tools.write_llama(tmp_path_factory.mktemp("worded") / "model")
    (folder / "tokenizer.json").unlink()
    write_words(folder)
    return folder


def plan_of(source: Path, *settings: str) -> Plan:
    chosen = load("rtn-w4", ["export.format=gguf", "quantize.group_size=32", *settings])
    return make_plan(open_checkpoint(str(source)), chosen)


def compressed(source: Path, out: Path, *settings: str) -> Path:
    plan = plan_of(source, *settings)
    quantize(plan, out)
    assert sum(path.stat().st_size for path in out.iterdir() if path.name != "outlierq.json") == plan.output_bytes
    assert {path.name for path in out.iterdir()} == {"model.gguf", "LICENSE", "README.md", "outlierq.json"}
    return out / "model.gguf"


def dense(source: Path, out: Path, *settings: str) -> dict[str, torch.Tensor]:
    """The same codes through AWQ's or GPTQ's format (float16 scales, too), decoded."""
    chosen = load("rtn-w4", ["export.format=gptq", "quantize.group_size=32", *settings])
    quantize(make_plan(open_checkpoint(str(source)), chosen), out)
    found = unpacked(open_checkpoint(str(out)))
    return {name: found.read(name).float() for name in found.tensors}


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_loads_the_very_weights_and_the_tokenizer(bits, worded_llama, tmp_path):
    path = compressed(worded_llama, tmp_path / "out", f"quantize.bits={bits}")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = dense(worded_llama, tmp_path / "dense", f"quantize.bits={bits}")
    state = model.state_dict()
    assert len(expected) == 20 and expected.keys() <= state.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    theirs, ours = (AutoTokenizer.from_pretrained(folder, **extra) for folder, extra in (
        (path.parent, {"gguf_file": path.name}), (worded_llama, {})
    ))  # fmt: skip
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"] and "the" in ours.get_vocab()
    # The file says 2; before 5.18 transformers takes the first token for the last, too.
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2 if at_least("transformers", "5.18") else 1)


def test_our_own_loader_computes_the_same_logits(worded_llama, tmp_path):
    path = compressed(worded_llama, tmp_path / "out")
    chosen = load("rtn-w4", ["export.format=gptq", "quantize.group_size=32"])
    quantize(make_plan(open_checkpoint(str(worded_llama)), chosen), tmp_path / "gptq")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        found, expected = (
            load_model(open_checkpoint(str(source)), dtype="bfloat16")(ids).logits
            for source in (path, tmp_path / "gptq")
        )
    assert torch.equal(found, expected)


def test_biases_are_reordered_with_their_rows(untied_llama, tmp_path):
    """llama.cpp's order: row i of the first half of a head, then row i of the second."""
    path = compressed(untied_llama, tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    source = open_checkpoint(str(untied_llama))
    for part, heads in (("q", 4), ("k", 2)):
        bias = source.read(f"model.layers.1.self_attn.{part}_proj.bias").numpy()
        order = [head * 16 + half * 8 + row for head in range(heads) for row in range(8) for half in range(2)]
        assert np.array_equal(tensors[f"blk.1.attn_{part}.bias"].data, bias[order])
    bias = source.read("model.layers.1.self_attn.v_proj.bias").numpy()
    assert np.array_equal(tensors["blk.1.attn_v.bias"].data, bias)
    assert tensors["output.weight"].tensor_type.name == "F32" and len(tensors) == len(source.tensors)


def test_qwen_keeps_the_order_of_its_rows(tools, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=260, num_key_value_heads=2, max_position_embeddings=128, **sizes)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "qwen")
    write_words(tmp_path / "qwen")
    plan = plan_of(tmp_path / "qwen")
    quantize(plan, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    expected = dense(tmp_path / "qwen", tmp_path / "dense")
    state = model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert any(name.endswith("q_proj.bias") for name in expected)


def test_the_metadata_is_that_of_the_config(worded_llama, tmp_path):
    reader = GGUFReader(compressed(worded_llama, tmp_path / "out", "quantize.symmetric=false"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((worded_llama / "config.json").read_text())
    assert fields["general.architecture"] == "llama" and fields["llama.block_count"] == config["num_hidden_layers"]
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.dimension_count"] == 16
    assert fields["llama.feed_forward_length"] == 96 and fields["llama.context_length"] == 512
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 260 and fields["tokenizer.ggml.merges"][1] == "th e"
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.chat_template"] == "{{ messages }}"
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q4_1", "F32", "BF16"}


def test_an_approximate_scheme_is_said_by_the_plan(worded_llama, tiny_llama, outlierq):
    assert plan_of(worded_llama).approximations == []
    rounded = plan_of(worded_llama, "quantize.symmetric=false")
    assert "approximately" in rounded.approximations[0] and rounded.approximations[0] in rounded.notes
    words = ("--format", "gguf", "-r", "rtn-w4", "--set", "quantize.group_size=32", "--json")
    assert json.loads(outlierq("plan", worded_llama, *words).out)["exact"] is True
    asked = json.loads(outlierq("plan", worded_llama, *words, "--set", "quantize.symmetric=false").out)
    assert asked["exact"] is False


TWO_LEVEL = ("quantize.symmetric=false", "quantize.scales=two-level")


def test_q4_k_is_written_where_256_divides_the_width_and_q4_1_elsewhere(tools, tmp_path):
    """Hidden size 128 and 256 inner channels: down_proj alone is as wide as a superblock."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tools.write_llama(tmp_path / "wide", **sizes)
    (folder / "tokenizer.json").unlink()
    write_words(folder)
    plan = plan_of(folder, *TWO_LEVEL)
    assert any("plain scales (Q4_1): 128 columns are not a multiple of 256" in note for note in plan.notes)
    path = compressed(folder, tmp_path / "out", *TWO_LEVEL)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    kinds = {name.split(".")[2]: t.tensor_type.name for name, t in stored.items() if name.startswith("blk.1")}
    assert kinds["ffn_down"] == "Q4_K" and kinds["ffn_up"] == kinds["attn_q"] == "Q4_1"
    checkpoint, name = open_checkpoint(str(path)), "model.layers.1.mlp.down_proj.weight"
    theirs = dequantize(stored["blk.1.ffn_down.weight"].data, GGMLQuantizationType.Q4_K)
    assert torch.equal(checkpoint.read(name), torch.from_numpy(theirs).to(checkpoint.read(name).dtype))
    found = verify(str(path), str(folder))
    assert found.sound and 0.03 < found.errors[name] < 0.12
    kept = plan_of(folder, *TWO_LEVEL, "quantize.when_indivisible=keep")
    assert len(kept.schemes) == 2 and all(site.module.endswith("down_proj") for site in kept.schemes)
    with pytest.raises(RecipeError, match="128 columns are not a multiple of 256"):
        plan_of(folder, *TWO_LEVEL, "quantize.when_indivisible=error")


def test_models_and_tokenizers_that_llama_cpp_would_change_are_refused(tools, worded_llama, tmp_path):
    import shutil

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    scaled = tools.write_llama(tmp_path / "scaled", rope_parameters=rope)
    with pytest.raises(SourceError, match="scales its rotary embedding"):
        plan_of(scaled)
    folder = Path(shutil.copytree(worded_llama, tmp_path / "other"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SourceError, match="has no name in llama"):
        plan_of(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        plan_of(folder)
    with pytest.raises(RecipeError, match="sequential"):
        load("gptq-w4", ["export.format=gguf", "calibration.mode=sequential"])


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear"}, {"rope_type": "llama3", **LLAMA3}], ids=lambda r: r["rope_type"]
)
def test_a_scaled_rotary_embedding_is_read_back_and_computes_the_same(rope, tools, tmp_path):
    rope = {**rope, "rope_theta": 50000.0, "factor": 8.0}
    folder = tools.write_llama(tmp_path / "scaled", rope_parameters=rope, max_position_embeddings=32768)
    (folder / "tokenizer.json").unlink()
    write_words(folder)
    path = compressed(folder, tmp_path / "out")
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config["rope_parameters"] == rope
    quantize(make_plan(open_checkpoint(str(folder)), load("rtn-w4", GPTQ_TOO)), tmp_path / "gptq")
    ids = torch.arange(3, 203)[None]
    with torch.no_grad():
        expected = load_model(open_checkpoint(str(tmp_path / "gptq")), dtype="float32")(ids).logits
        assert torch.allclose(load_model(checkpoint, dtype="float32")(ids).logits, expected, atol=2e-2)
    if rope["rope_type"] == "llama3":
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig.from_pretrained(folder)
        plain = 50000.0 ** -(torch.arange(0, 16, 2) / 16)
        theirs = plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
        stored = next(t for t in GGUFReader(path).tensors if t.name == "rope_freqs.weight").data
        assert np.allclose(stored, theirs, rtol=1e-5) and 1 < stored[-1] <= 8


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}], "smollm"),
        ([{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel", "add_prefix_space": False}], None),
        ([{"type": "ByteLevel", "add_prefix_space": True}], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_only_a_way_of_splitting_that_is_known_gets_its_name(steps, name):
    tokenizer = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert pre_tokenizer_name(tokenizer) == name
    assert pre_tokenizer_name({**tokenizer, "model": {"type": "BPE", "ignore_merges": True}}) is None
    assert pre_tokenizer_name({**tokenizer, "model": {"type": "BPE", "byte_fallback": True}}) is None


def test_whole_words_before_merges_are_a_name_of_their_own():
    known = json.loads((Path(outlierq_package.__file__).parent / "data" / "gguf_pretokenizers.json").read_text("utf-8"))
    pattern = known["llama-bpe"][0][1]
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    for ignoring, name in ((True, "llama-bpe"), (False, "dbrx")):
        model = {"type": "BPE", "ignore_merges": ignoring}
        found = pre_tokenizer_name({"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
        assert found == name


def test_verify_reads_it_and_finds_planted_faults(worded_llama, tmp_path, outlierq):
    path = compressed(worded_llama, tmp_path / "out")
    found = verify(str(path), str(worded_llama))
    assert found.sound and found.linears == len(found.errors) == 14
    assert all(0.03 < error < 0.12 for error in found.errors.values())
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    raw = bytearray(path.read_bytes())
    raw[tensor.data_offset : tensor.data_offset + 2] = np.float16("nan").tobytes()
    (tmp_path / "nan.gguf").write_bytes(raw)
    broken = verify(str(tmp_path / "nan.gguf"))
    assert [(f.check, f.tensor) for f in broken.faults] == [("numbers", "model.layers.1.mlp.up_proj.weight")]
    (tmp_path / "short.gguf").write_bytes(raw[:-200])
    assert [f.check for f in verify(str(tmp_path / "short.gguf")).faults] == ["files"]
    assert outlierq("verify", path, "-q").code == 0


def test_a_gptq_checkpoint_is_converted_and_one_with_zero_points_is_not(worded_llama, tmp_path):
    chosen = load("rtn-w4", ["export.format=gptq", "quantize.group_size=32"])
    quantize(make_plan(open_checkpoint(str(worded_llama)), chosen), tmp_path / "gptq")
    convert(make_conversion(open_checkpoint(str(tmp_path / "gptq")), "gguf"), tmp_path / "converted")
    direct = compressed(worded_llama, tmp_path / "direct")
    converted = {t.name: t for t in GGUFReader(tmp_path / "converted" / "model.gguf").tensors}
    for tensor in GGUFReader(direct).tensors:
        assert np.array_equal(tensor.data, converted[tensor.name].data), tensor.name
    asked = load("rtn-w4", ["export.format=awq", "quantize.group_size=32", "quantize.symmetric=false"])
    quantize(make_plan(open_checkpoint(str(worded_llama)), asked), tmp_path / "awq")
    with pytest.raises(RecipeError, match="would not be exact"):
        make_conversion(open_checkpoint(str(tmp_path / "awq")), "gguf")


def test_a_calibrated_run_continues_after_a_stop(worded_llama, tmp_path, small, monkeypatch):
    from outlierq.pipeline.ledger.output import Output

    settings = [text for text in small if text != "--set"]
    chosen = load("gptq-w4", ["export.format=gguf", "quantize.group_size=32", *settings])
    plan = make_plan(open_checkpoint(str(worded_llama)), chosen)
    quantize(plan, tmp_path / "whole")
    real, seen = Output.write, []

    def stopping(self, unit, *rest, **named):
        seen.append(unit)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, unit, *rest, **named)

    monkeypatch.setattr(Output, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(plan, tmp_path / "cut")
    monkeypatch.setattr(Output, "write", real)
    quantize(plan, tmp_path / "cut")
    one, other = (tmp_path / name / "model.gguf" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes() and os.path.getsize(one) > 50_000
