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
from transformers import AutoModelForCausalLM, AutoTokenizer

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.export.gguf import GgufFormat, encode_blocks, ggml_type, gguf_name
from outlierq.export.gguf_header import pre_tokenizer_name
from outlierq.load import decode_rows, load_model, open_checkpoint, unpacked
from outlierq.pipeline.convert import convert, make_conversion
from outlierq.pipeline.plan import Plan, make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.verify import verify
from outlierq.recipe import load

TEXT = "The sea was calm, and 1234 birds slept."


def site(rows: int, columns: int, name: str = "model.layers.0.mlp.up_proj") -> LinearSite:
    return LinearSite(name, f"{name}.weight", None, rows, columns, 0)


def random_weight(rows: int, columns: int, scheme: QuantScheme, seed: int = 0) -> QuantTensor:
    """Any codes, scales and zero points that the scheme allows."""
    make = torch.Generator().manual_seed(seed)
    groups, low, high = scheme.groups(columns), int(scheme.code_min), int(scheme.code_max)
    codes = torch.randint(low, high + 1, (rows, columns), generator=make)
    scale = torch.exp(torch.randn(rows, groups, generator=make) * 2 - 5).to(torch.float16)
    zero = None if scheme.symmetric else torch.randint(0, high + 1, (rows, groups), generator=make).to(torch.uint8)
    return QuantTensor(codes.to(torch.int8 if scheme.symmetric else torch.uint8), scale, zero, scheme)


SCHEMES = [
    QuantScheme(bits, size, symmetric, "float16")
    for bits, symmetric in ((4, True), (4, False), (8, True))
    for size in (32, 96, None)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gguf_reads_from_our_blocks_what_was_meant(scheme):
    meant = random_weight(40, 192, scheme)
    found = dequantize(encode_blocks(site(40, 192), meant).numpy(), GGMLQuantizationType[ggml_type(scheme)])
    expected = meant.dequantize().numpy()
    if scheme.symmetric:
        assert np.array_equal(found, expected)
        return
    # m = -zero * scale is rounded to float16: half a unit in its last place.
    width = scheme.columns_per_group(192)
    product = (meant.zero_point.float() * meant.scale.float()).repeat_interleave(width, 1).numpy()
    assert (np.abs(found - expected) <= product * 2**-11 + 2**-25 + 1e-6 * np.abs(expected)).all()
    assert not np.array_equal(found, expected)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_decoding_gives_every_part_back_also_where_rows_are_in_rotary_order(scheme, heads):
    config = {"model_type": "llama" if heads else "qwen2", "num_attention_heads": heads or 4}
    linear, form = site(96, 192, "model.layers.11.self_attn.q_proj"), GgufFormat(config)
    meant = random_weight(96, 192, scheme, seed=1)
    (name, stored), *others = form.encode(linear, meant).items()
    assert name == "blk.11.attn_q.weight" and not others
    assert [(name, "U8", tuple(stored.shape))] == form.tensor_specs(linear, scheme)
    parts = {"weight": stored, **form.row_order(linear)}
    for start, stop in ((0, 96), (32, 96), (64, 72)):
        found, wanted = decode_rows(parts, scheme, (96, 192), start, stop), meant.rows(start, stop)
        assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scale, wanted.scale)
        assert scheme.symmetric or torch.equal(found.zero_point, wanted.zero_point)


def test_blocks_of_another_scheme_are_refused():
    meant = random_weight(8, 64, QuantScheme(4, 32, True, "float16"))
    parts = {"weight": encode_blocks(site(8, 64), meant), "heads": torch.tensor(0)}
    with pytest.raises(SourceError, match="are not int8"):
        decode_rows(parts, QuantScheme(8, 32, True, "float16"), (8, 64), 0, 8)
    with pytest.raises(SourceError, match="several scales"):
        decode_rows(parts, QuantScheme(4, 64, True, "float16"), (8, 64), 0, 8)


def test_what_the_format_cannot_hold_is_said():
    form, linear = GgufFormat({}), site(64, 64)
    assert form.obstacle(linear, QuantScheme(8, None, True)) is None
    assert form.approximation(QuantScheme(4, 32, False)) and not form.approximation(QuantScheme(4, 32))
    inputs = ActivationScheme()
    for scheme in (QuantScheme(3, 32), QuantScheme(8, 32, False), QuantScheme(4, 16), QuantScheme(8, None, True)):
        scheme = QuantScheme(8, None, activations=inputs) if scheme == QuantScheme(8, None, True) else scheme
        assert "gguf stores" in form.obstacle(linear, scheme)
    assert "multiple" in form.obstacle(site(64, 48), QuantScheme(8, None))
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
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


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


def test_models_and_tokenizers_that_llama_cpp_would_change_are_refused(tools, worded_llama, tmp_path):
    import shutil

    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
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
    assert pre_tokenizer_name({**tokenizer, "model": {"type": "BPE", "byte_fallback": True}}) is None


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
    from outlierq.pipeline.output import Output

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
