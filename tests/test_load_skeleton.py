"""The skeleton computes what the original model computes, and its structure accounts for every tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from outlierq.core.errors import SourceError
from outlierq.load import (
    build_skeleton,
    checkpoint_names,
    find_structure,
    load_tensors_into,
    open_checkpoint,
    release,
)

IDS = torch.arange(12)[None] % 60

LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def gpt2(**options) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1, **options
        )
    )


def bloom() -> BloomForCausalLM:
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


def gemma2() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Gemma2ForCausalLM(config)


MODELS = {
    "llama": lambda: llama(tied=False),
    "tied llama": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bloom": bloom,
    "gemma2": gemma2,
}


def saved(model: torch.nn.Module, folder: Path, **options) -> Path:
    """The model as a folder, its weights made random where initialisation left zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rename_tensors(folder: Path, rename, extra: dict[str, torch.Tensor] | None = None) -> None:
    """Rewrite model.safetensors with other names; `rename` returns None to drop a tensor."""
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({**{name: tensor for name, tensor in tensors.items() if name}, **(extra or {})}, path)


def opened(folder: Path):
    checkpoint = open_checkpoint(str(folder))
    skeleton = build_skeleton(checkpoint)
    return checkpoint, skeleton, find_structure(checkpoint, skeleton)


def filled(folder: Path) -> torch.nn.Module:
    """The skeleton filled as the pipeline fills it: what is outside of blocks first, then block by block."""
    checkpoint, skeleton, structure = opened(folder)
    names = checkpoint_names(checkpoint, skeleton)
    load_tensors_into(skeleton, checkpoint, names, skip=[block.name for block in structure.blocks])
    for block in structure.blocks:
        load_tensors_into(skeleton.get_submodule(block.name), checkpoint, names, prefix=block.name)
    return skeleton


def every_tensor(structure) -> list[str]:
    outside = [name for site in structure.outside_sites for name in (site.weight, site.bias) if name]
    return [*(name for block in structure.blocks for name in block.tensors), *outside, *structure.outside_tensors]


@pytest.mark.parametrize("name", MODELS)
def test_the_filled_skeleton_gives_the_logits_of_the_original(name, tmp_path):
    model = MODELS[name]()
    skeleton = filled(saved(model, tmp_path, max_shard_size="20KB"))
    assert not any(parameter.is_meta for parameter in skeleton.parameters())
    with torch.no_grad():
        assert torch.equal(skeleton(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", MODELS)
def test_every_stored_tensor_is_in_the_structure_once(name, tmp_path):
    checkpoint, _, structure = opened(saved(MODELS[name](), tmp_path))
    assert sorted(every_tensor(structure)) == sorted(checkpoint.tensors)


def test_the_skeleton_holds_no_weights_and_is_ready_to_run(tmp_path):
    _, skeleton, _ = opened(saved(llama(tied=False), tmp_path))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in skeleton.buffers()} == {"cpu"}
    assert not skeleton.training
    assert skeleton.config.use_cache is False
    assert skeleton.config._attn_implementation == "sdpa"


def test_a_llama_has_its_sites_in_the_order_of_definition(tmp_path):
    _, _, structure = opened(saved(llama(tied=False), tmp_path))
    assert [block.name for block in structure.blocks] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    block = structure.blocks[1]
    assert [site.module for site in block.sites] == [f"model.layers.1.{name}" for name in LINEARS]
    key = block.sites[1]
    assert (key.weight, key.bias, key.out_features, key.in_features) == (
        "model.layers.1.self_attn.k_proj.weight",
        None,
        16,
        32,
    )
    assert (key.block, key.kind, key.transposed) == (1, "Linear", False)
    assert [site.module for site in structure.outside_sites] == ["lm_head"]
    assert structure.outside_tensors == ("model.embed_tokens.weight", "model.norm.weight")
    assert structure.tied == ()


def test_a_tied_head_is_a_tie_and_no_site(tmp_path):
    _, _, structure = opened(saved(llama(tied=True), tmp_path))
    assert structure.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert structure.outside_sites == ()


def test_a_tied_head_shares_the_parameter_of_the_embedding(tmp_path):
    skeleton = filled(saved(llama(tied=True), tmp_path))
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight


def test_a_config_silent_about_ties_counts_as_tied_when_the_head_is_absent(tmp_path):
    edit_config(saved(llama(tied=True), tmp_path), tie_word_embeddings=None)
    assert opened(tmp_path)[2].tied == (("lm_head.weight", "model.embed_tokens.weight"),)


def test_an_absent_head_is_missed_when_the_config_says_untied(tmp_path):
    edit_config(saved(llama(tied=True), tmp_path), tie_word_embeddings=False)
    with pytest.raises(SourceError, match=r"lacks 1 parameters of LlamaForCausalLM: lm_head\.weight"):
        opened(tmp_path)


def test_a_head_stored_twice_is_tied_only_while_both_copies_are_equal(tmp_path):
    saved(llama(tied=True), tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rename_tensors(tmp_path, lambda name: name, {"lm_head.weight": embedding.clone()})
    checkpoint, _, structure = opened(tmp_path)
    assert structure.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert "lm_head.weight" in structure.outside_tensors
    assert sorted(every_tensor(structure)) == sorted(checkpoint.tensors)
    rename_tensors(tmp_path, lambda name: name, {"lm_head.weight": embedding + 1})
    structure = opened(tmp_path)[2]
    assert structure.tied == ()
    assert [site.module for site in structure.outside_sites] == ["lm_head"]


def test_an_embedding_stored_under_the_name_of_the_head_is_found(tmp_path):
    model = llama(tied=True)
    saved(model, tmp_path)
    rename_tensors(tmp_path, lambda name: "lm_head.weight" if "embed" in name else name)
    structure = opened(tmp_path)[2]
    assert structure.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert structure.outside_sites == ()
    with torch.no_grad():
        assert torch.equal(filled(tmp_path)(IDS).logits, model(IDS).logits)


def test_gpt2_stores_its_linears_transposed_and_with_bias(tmp_path):
    _, _, structure = opened(saved(gpt2(), tmp_path))
    site = structure.blocks[0].sites[0]
    assert (site.module, site.kind, site.transposed) == ("transformer.h.0.attn.c_attn", "Conv1D", True)
    assert (site.out_features, site.in_features) == (96, 32)
    assert site.bias == "transformer.h.0.attn.c_attn.bias"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_a_file_without_the_base_model_prefix_is_matched(name, tmp_path):
    model = MODELS[name]()
    saved(model, tmp_path)
    prefix = f"{model.base_model_prefix}."
    rename_tensors(tmp_path, lambda name: name.removeprefix(prefix))
    checkpoint, skeleton, structure = opened(tmp_path)
    names = checkpoint_names(checkpoint, skeleton)
    site = structure.blocks[0].sites[0]
    assert site.module.startswith(prefix)
    assert site.weight == f"{site.module}.weight".removeprefix(prefix) == names[f"{site.module}.weight"]
    with torch.no_grad():
        assert torch.equal(filled(tmp_path)(IDS).logits, model(IDS).logits)


def test_tensors_that_the_model_does_not_know_are_kept_outside(tmp_path):
    saved(gpt2(), tmp_path)
    extra = {"transformer.h.0.attn.bias_mask": torch.ones(1, 1, 8, 8), "vision.patch": torch.ones(2)}
    rename_tensors(tmp_path, lambda name: name, extra)
    checkpoint, _, structure = opened(tmp_path)
    assert extra.keys() <= set(structure.outside_tensors)
    assert sorted(every_tensor(structure)) == sorted(checkpoint.tensors)


def test_missing_parameters_are_counted_and_five_are_named(tmp_path):
    saved(llama(tied=False), tmp_path)
    rename_tensors(tmp_path, lambda name: None if ".layers.1." in name else name)
    with pytest.raises(SourceError, match=r"lacks 9 parameters .*layers\.1\.self_attn\.q_proj\.weight.* and 4 more"):
        opened(tmp_path)


def test_an_already_compressed_checkpoint_gives_a_plain_skeleton_and_a_clear_refusal(tmp_path):
    saved(llama(tied=False), tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    rename_tensors(tmp_path, lambda name: name.replace("q_proj.weight", "q_proj.qweight"))
    checkpoint = open_checkpoint(str(tmp_path))
    skeleton = build_skeleton(checkpoint)
    assert type(skeleton.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    with pytest.raises(SourceError, match="lacks 3 parameters") as caught:
        find_structure(checkpoint, skeleton)
    assert "already compressed (gptq)" in caught.value.hint


def test_a_tensor_of_another_shape_than_the_config_asks_for_is_refused(tmp_path):
    edit_config(saved(llama(tied=False), tmp_path), intermediate_size=40)
    with pytest.raises(SourceError, match=r"gate_proj\.weight is \[48, 32\], but .* needs \[40, 32\]"):
        opened(tmp_path)


def test_an_unknown_model_type_gets_the_nearest_name(tmp_path):
    edit_config(saved(llama(tied=False), tmp_path), model_type="lama")
    with pytest.raises(SourceError, match="model_type 'lama', unknown to transformers") as caught:
        opened(tmp_path)
    assert "llama" in caught.value.hint


def test_a_config_with_values_of_the_wrong_type_is_refused(tmp_path):
    edit_config(saved(llama(tied=False), tmp_path), hidden_size="wide")
    with pytest.raises(SourceError, match=r"config\.json of .* is not valid"):
        opened(tmp_path)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path):
    edit_config(saved(llama(tied=False), tmp_path), model_type="t5")
    with pytest.raises(SourceError, match="not supported: transformers has no decoder language model"):
        opened(tmp_path)


def test_a_part_is_filled_in_the_wanted_dtype_and_released_again(tmp_path):
    checkpoint, skeleton, structure = opened(saved(llama(tied=False), tmp_path))
    names = checkpoint_names(checkpoint, skeleton)
    block = skeleton.get_submodule(structure.blocks[1].name)
    load_tensors_into(block, checkpoint, names, prefix=structure.blocks[1].name, dtype="bfloat16")
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert {parameter.is_meta for parameter in block.parameters()} == {False}
    assert skeleton.model.layers[0].mlp.up_proj.weight.is_meta
    stored = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(block.mlp.up_proj.weight, stored.bfloat16())
    release(block)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_mixtures_that_their_class_merges_in_an_unknown_way_are_refused_by_name(tmp_path, monkeypatch):
    from transformers import MixtralConfig, MixtralForCausalLM, conversion_mapping

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr("outlierq.load.model.experts.fused.fused_modules", lambda model: {})
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *args, **options: [])
    with pytest.raises(SourceError, match="experts") as caught:
        opened(tmp_path)
    assert "mixtures are not supported" in caught.value.hint


def test_weights_of_any_size_are_no_tables_that_a_config_asks_for():
    from outlierq.core.machine.building import MOST_TABLE_BYTES, building

    with building("a large model"):
        large = torch.nn.ModuleList([torch.nn.Linear(1 << 14, 1 << 14) for _ in range(5)])
    assert sum(part.weight.nbytes for part in large) > MOST_TABLE_BYTES
    assert all(part.weight.is_meta for part in large)
