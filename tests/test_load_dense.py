"""The whole model for evaluation equals what transformers loads, plain or packed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from libraries import dense_words
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from outlierq.core.errors import SourceError
from outlierq.load import build_skeleton, find_structure, load_model, load_tokenizer, open_checkpoint, unpacked

IDS = torch.arange(12)[None] % 60


def llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    """A tiny random Llama, saved to the folder."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder, **options)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def compress(model: LlamaForCausalLM, folder: Path, groups: dict[str, dict]) -> dict[str, torch.Tensor]:
    """Quantize and save the model with the compressed-tensors package; the weights as that package rounds them.

    groups: name -> arguments of the weights, and targets.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        fake_quantize,
    )

    schemes = {}
    for name, group in groups.items():
        weights = QuantizationArgs(**{key: value for key, value in group.items() if key != "targets"})
        schemes[name] = QuantizationScheme(targets=group["targets"], weights=weights, format="pack-quantized")
    config = QuantizationConfig(config_groups=schemes, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, config)
    rounded = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            set_grid(module, scheme.weights)
            zero = getattr(module, "weight_zero_point", None)
            rounded[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return rounded


def set_grid(module: torch.nn.Module, weights) -> None:
    """Give a module scales and zero points from the extremes of each group."""
    rows = module.weight.shape[0]
    grouped = module.weight.detach().reshape(rows, module.weight_scale.shape[1], -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    steps = (1 << weights.num_bits) - 1
    if weights.symmetric:
        module.weight_scale.data = torch.maximum(-low, high) * 2 / steps
        return
    module.weight_scale.data = (high - low) / steps
    zero = torch.round(-low / module.weight_scale) - (1 << (weights.num_bits - 1))
    module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_a_plain_model_gives_the_logits_of_from_pretrained(tmp_path, tied, shard_size):
    llama(tmp_path, tied=tied, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    model = load_model(open_checkpoint(str(tmp_path)))
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_the_wanted_dtype_is_given_whatever_is_stored(tmp_path):
    llama(tmp_path, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(str(tmp_path))
    assert {parameter.dtype for parameter in load_model(checkpoint).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_model(checkpoint, dtype="bfloat16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "groups",
    [
        {"all": {"targets": ["Linear"], "num_bits": 4, "strategy": "group", "group_size": 16}},
        {"all": {"targets": ["Linear"], "num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}},
        pytest.param(
            {"all": {"targets": ["Linear"], "num_bits": 3, "strategy": "channel", "symmetric": False}},
            marks=dense_words,
        ),
        {"all": {"targets": ["Linear"], "num_bits": 8, "strategy": "channel"}},
    ],
    ids=["4 bit", "4 bit asymmetric", "3 bit channel asymmetric", "8 bit channel"],
)
def test_a_packed_model_gives_the_logits_that_compressed_tensors_decodes(tmp_path, groups):
    from transformers import CompressedTensorsConfig

    compress(llama(tmp_path / "plain"), tmp_path / "packed", groups)
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    assert any(name.endswith(".weight_packed") for name in checkpoint.tensors)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.allclose(logits(load_model(checkpoint)), logits(reference), atol=1e-5)


@dense_words
def test_every_config_group_is_decoded_with_its_own_bits_and_group_size(tmp_path):
    groups = {
        "down": {"targets": ["re:.*down_proj$"], "num_bits": 8, "strategy": "group", "group_size": 32},
        "key": {"targets": ["model.layers.1.self_attn.k_proj"], "num_bits": 3, "strategy": "channel"},
        "rest": {"targets": ["Linear"], "num_bits": 2, "strategy": "group", "group_size": 16, "symmetric": False},
    }
    rounded = compress(llama(tmp_path / "plain"), tmp_path / "packed", groups)
    assert len(rounded) == 14
    found = dict(load_model(open_checkpoint(str(tmp_path / "packed"))).named_parameters())
    for name, expected in rounded.items():
        assert torch.allclose(found[name], expected, atol=1e-6), name


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    groups = {"all": {"targets": ["Linear"], "num_bits": 4, "strategy": "group", "group_size": 16}}
    compress(llama(tmp_path / "plain"), tmp_path / "packed", groups)
    return tmp_path / "packed"


def test_a_packed_checkpoint_seen_as_a_plain_one_has_the_structure_of_the_plain_one(packed):
    plain = open_checkpoint(str(packed.parent / "plain"))
    seen = unpacked(open_checkpoint(str(packed)))
    assert seen.tensors.keys() == plain.tensors.keys()
    assert all(seen.tensors[name].shape == plain.tensors[name].shape for name in plain.tensors)
    assert "quantization_config" not in seen.config
    assert find_structure(seen, build_skeleton(seen)) == find_structure(plain, build_skeleton(plain))
    assert unpacked(plain) is plain


def change_quantization(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"quant_method": "hqq"}, "compressed with hqq, which is not decoded here"),
        (
            {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
            "a quantized KV cache, but no k_scale",
        ),
        (
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            "rotations that run with the model",
        ),
        (
            {"config_groups": {"g": {"format": "marlin-24", "targets": ["Linear"], "weights": {}}}},
            "format marlin-24",
        ),
        (
            {
                "config_groups": {
                    "g": {
                        "format": "pack-quantized",
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
                        "input_activations": {"num_bits": 5, "type": "int", "strategy": "token", "dynamic": True},
                    }
                }
            },
            "inputs of 5-bit int numbers per token",
        ),
        (
            {
                "config_groups": {
                    "g": {"format": "pack-quantized", "targets": ["re:nothing"], "weights": {"num_bits": 4}}
                }
            },
            "no config group targets it",
        ),
    ],
)
def test_compression_that_a_plain_model_cannot_show_is_refused(packed, changes, fault):
    change_quantization(packed, **changes)
    with pytest.raises(SourceError, match=fault):
        load_model(open_checkpoint(str(packed)))


def test_a_rotation_fused_into_the_weights_is_no_obstacle(packed):
    change_quantization(packed, transform_config={"config_groups": {"R1": {"apply": [{"location": "weight_input"}]}}})
    assert torch.isfinite(logits(load_model(open_checkpoint(str(packed))))).all()


def test_the_tokenizer_of_the_folder_is_loaded(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    llama(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path)
    assert load_tokenizer(open_checkpoint(str(tmp_path)))("b a c").input_ids == [1, 0, 2]


def test_a_tokenizer_of_pieces_names_the_packages_that_read_it(tmp_path, monkeypatch):
    from outlierq.load import whole

    llama(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr(whole, "find_spec", lambda name: None if name == "sentencepiece" else name)
    with pytest.raises(SourceError, match=r"tokenizer\.model alone, and sentencepiece is not installed") as caught:
        load_tokenizer(open_checkpoint(str(tmp_path)))
    assert caught.value.hint.startswith("pip install sentencepiece,")


def test_a_protobuf_too_old_for_sentencepiece_is_named_with_the_remedy(tiny_llama, tmp_path, monkeypatch):
    source = shutil.copytree(tiny_llama, tmp_path / "pieces")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"\n\x00")

    class TooOld:
        """The import of code that was made with a newer protobuf."""

        def find_spec(self, name, path=None, target=None):
            if name == "sentencepiece.sentencepiece_model_pb2":
                raise ImportError("gencode 7.36.1 runtime 5.29.1. Runtime version cannot be older")

    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setattr(sys, "meta_path", [TooOld(), *sys.meta_path])
    with pytest.raises(
        SourceError, match=r"sentencepiece [\d.]+, protobuf [\d.]+ do not read together: gencode"
    ) as told:
        load_tokenizer(open_checkpoint(str(source)))
    assert "pip install --upgrade protobuf" in told.value.hint


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    llama(tmp_path)
    with pytest.raises(SourceError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(open_checkpoint(str(tmp_path)))
