"""Tiny random checkpoints of every architecture that the installed transformers can build: see `coverage.py`.

A config is made small by the names of its fields, which are much the same everywhere; what that gets wrong is put right
by a table. Both say only how large a test model is, nothing of how one is compressed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto import modeling_auto

# A vocabulary as large as no other dimension, so that embeddings and heads are told from linears by their shape.
VOCABULARY = 500
POSITIONS = 384  # likewise
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
SPREAD = 3.0  # of the logits
LARGEST = 20_000_000  # weights of a tiny model

Sizes = Mapping[tuple[str, ...], float]

BLOCKS, HEADS, KV_HEADS, HEAD, HIDDEN, INNER, EXPERTS, CHOSEN = 4, 4, 2, 32, 128, 256, 4, 2
TEXT = {
    ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"): VOCABULARY,
    ("hidden_size", "n_embd", "d_model", "embed_dim", "hidden_dim", "word_embed_proj_dim", "embedding_size"): HIDDEN,
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim", "mlp_dim", "dff", "dim_ff"): INNER,
    ("d_inner", "decoder_ffn_dim", "encoder_ffn_dim", "dense_intermediate_size", "shared_intermediate_size"): INNER,
    ("intermediate_size_mlp", "mamba_d_ssm", "shared_expert_intermediate_size", "d_ff"): INNER,
    ("moe_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim"): HIDDEN,
    ("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"): HIDDEN,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "layers"): BLOCKS,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"): HEADS,
    ("encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads"): HEADS,
    ("num_key_value_heads", "swa_num_key_value_heads", "kv_n_heads", "linear_num_key_heads"): KV_HEADS,
    ("head_dim", "v_head_dim", "qk_nope_head_dim", "swa_head_dim", "linear_key_head_dim", "dim_head"): HEAD,
    ("linear_value_head_dim", "linear_head_dim", "index_head_dim", "kv_channels", "attention_hidden_size"): HEAD,
    ("swa_v_head_dim",): HEAD,
    ("qk_rope_head_dim", "rotary_dim", "mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size"): 16,
    ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "backbone_hidden_size", "global_head_dim"): 64,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"): POSITIONS,
    ("original_max_position_embeddings", "max_target_positions"): POSITIONS,
    ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "local_attention"): 64,
    ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"): EXPERTS,
    ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k"): CHOSEN,
    ("num_experts_per_token", "top_k_experts", "top_k"): CHOSEN,
    ("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups"): 1,
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"): 1,
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"): 8,
    ("mamba_d_head", "mamba_head_dim", "adapter_rank"): 32,
    ("index_n_heads",): 4,
    ("index_topk",): 40,  # of some 48 tokens: another choice of few would be another model
    ("hidden_size_per_layer_input", "router_hidden_size"): 32,
    ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_kv_shared_layers", "num_mtp_layers"): 1,
    ("num_nextn_predict_layers",): 0,
    ("attention_multiplier",): HEAD**-0.5,  # of 1, attention is so sharp that any rounding turns it
}  # fmt: skip
TOWER = {
    ("hidden_size", "d_model", "embed_dim", "dim", "hidden_dim", "upsample_groups"): 64,
    ("intermediate_size", "encoder_ffn_dim", "mlp_dim"): 128,
    ("num_hidden_layers", "depth", "encoder_layers", "num_layers", "layers", "n_layers", "num_blocks"): 2,
    ("num_attention_heads", "num_heads", "encoder_attention_heads", "attention_heads", "n_heads"): 2,
    ("num_key_value_heads",): 2,
    ("head_dim",): 32,
    ("image_size",): 56,
    ("patch_size",): 14,
    ("out_hidden_size", "output_dim", "projection_dim", "text_hidden_size", "vision_output_dim"): HIDDEN,
    ("projector_input_dim", "projector_output_dim"): HIDDEN,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}

# What field names alone do not tell. `text`, `vision` and so on: of the part of the config.
HYBRID = ["linear_attention", "full_attention"] * 2
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}
HALF_MROPE = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}}
EQUAL_MROPE = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [6, 6, 4]}}
MROPE_4 = {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [4, 4, 4, 4]}}
VQ = {"base_channels": 32, "latent_channels": 32, "embed_dim": 32, "num_embeddings": 64, "codebook_size": 64}
GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0, "global_head_dim": 64}
TIMM = {"architecture": "mobilenetv4_conv_small_050", "hidden_size": 64}  # the smallest tower of that library
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
            for name in ("full_attention", "sliding_attention")
        }
    },
    "chameleon": {"vocabulary_map": {"<image>": 3}, "vq_config": VQ},
    "cosmos3_edge": {"text_config": MROPE},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 3]}},
    "dots3_note": {
        "text_config": {"per_layer_config": {}},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": HIDDEN},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS, "layer_types": ["indexed_attention"] * BLOCKS},
    "emu3": {"vocabulary_map": {"<image>": 3}, "vq_config": VQ | {"embed_dim": 4, "latent_channels": 4}},
    "ernie4_5_vl_moe": {"text_config": {**EQUAL_MROPE, "moe_intermediate_size": [HIDDEN, HIDDEN]}},
    "fast_vlm": {"vision_config": TIMM},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": HIDDEN, "intermediate_size": HIDDEN // 4}},
    "gemma3n": {"vision_config": TIMM},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "glm46v": {"text_config": HALF_MROPE},
    "glm4v": {"text_config": HALF_MROPE},
    "glm4v_moe": {"text_config": HALF_MROPE},
    "glm5_next": {"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}},
    "glm_ocr": {"text_config": HALF_MROPE},
    "glmga": {"text_config": HALF_MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [2, 3, 0, 1], "downsample_rate": "1/2",
    },
    "hunyuan_vl": {"text_config": MROPE_4},
    "inkling_text": {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32}},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "molmo2": {"vision_config": {"image_size": [56, 56]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"out_hidden_size": 256, "projector_hidden_size": HIDDEN},
    "nemo_speechlm": {"audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}}},
    "muse_spark": {
        "text_config": {"moe_hidden_size": HIDDEN, "qk_scale_factor": 1.0},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [16, 32, 64, 64]},
        "out_hidden_size": 256, "projector_hidden_size": HIDDEN,
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 112},
        "vision_hidden_size": 64, "projector_hidden_size": HIDDEN,
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "num_hidden_layers": 4},
    "paddleocr_vl": {"text_config": MROPE},
    "perception_lm": {"vision_config": TIMM | {"architecture": "vit_tiny_patch16_224", "model_args": VIT}},
    "qwen2_5_omni_thinker": {"text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
    "rwkv": {"attention_hidden_size": HIDDEN},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": HEADS, "n_mamba_heads": 2,
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 64,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": HEADS,
        "use_shared_attention_adapter": True,
    },
    "vibevoice_asr": {
        name: {"num_filters": 4, "depths": [1] * 7, "hidden_size": 16}
        for name in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "layer_types": HYBRID, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 32,
        "indexer_budget": 64, "indexer_compress_ratio": 16, "hc_lowrank": 32, "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2, "ple_embed_dim": 32, "split_ngram_parts": 2, "ple_layer_ids": [1],
    },
}  # fmt: skip

NOT_BUILT = {
    "blip": "writes about images only",
    "blip-2": "writes about images only",
    "idefics": "writes about images only",
    "instructblip": "writes about images only",
    "instructblipvideo": "writes about images only",
    "kosmos-2": "writes about images only",
    "pi0": "moves robots",
    "shieldgemma2": "says yes or no to images",
    "voxtral_realtime": "writes what it hears only",
    "blt": "reads patches of bytes, with a model of its own for where they end",
    "dbrx": "transformers gives its parts no rotary settings",
    "gemma4_assistant": "drafts for another model, whose hidden states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states it reads",
    "evolla": "reads proteins, and transformers has no Auto class for it",
    "kyutai_speech_to_text": "reads text and codes of sound at once",
    "moshi": "speaks and listens",
    "musicgen": "writes sound",
    "musicgen_melody": "writes sound",
    "qwen2_5_omni": "speaks, too: what writes text in it is qwen2_5_omni_thinker",
    "qwen3_omni_moe": "speaks, too: what writes text in it is qwen3_omni_moe_thinker",
    "trocr": "is the decoder of another model",
}


def architectures() -> dict[str, str]:
    """Model type -> "text" or "multimodal", of everything that writes text from left to right.

    Classes that can also fill in masks are encoders, and those whose config is of an encoder and a decoder translate:
    both are left out.
    """
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    several = {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    kinds = {name: "text" for name in causal if name not in masked} | dict.fromkeys(several, "multimodal")
    return {name: kind for name, kind in kinds.items() if name not in NOT_BUILT and not _translates(name)}


def _translates(model_type: str) -> bool:
    """Whether the config describes an encoder and a decoder."""
    fields = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    return fields.get("is_encoder_decoder") is True


def auto_class(kind: str, model_type: str) -> Any:
    """The Auto class of transformers in which an architecture is loaded."""
    if kind == "text":
        return AutoModelForCausalLM
    image = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if image else AutoModelForMultimodalLM


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of a model type, made small."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_arguments(kind, TEXT, OVERRIDES.get(model_type, {})))


def _arguments(kind: type[PreTrainedConfig], sizes: Sizes, own: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that make a small config: sizes by the names of fields, then what is particular."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments: dict[str, Any] = {name: size for names, size in sizes.items() for name in names if name in fields}
    arguments |= _token_ids(fields)
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        arguments["num_key_value_heads"] = HEADS  # latent attention has keys for each head
    parts = getattr(kind, "sub_configs", None) or {}
    default = kind() if parts else None
    for name in parts:
        part = getattr(default, name, None)
        if name in fields and isinstance(part, PreTrainedConfig):
            arguments[name] = _part(type(part), name, own.get(name, {}))
    if "dtype" in fields:
        arguments["dtype"] = "bfloat16"
    return arguments | {name: value for name, value in own.items() if name not in parts}


def _part(kind: type[PreTrainedConfig], name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a config inside another one."""
    text = any(word in name for word in ("text", "language", "llm", "thinker", "decoder"))
    shared = OVERRIDES.get(kind.model_type, {}) if text else {}
    arguments = _arguments(kind, TEXT if text else TOWER, {**shared, **own})
    return {"model_type": kind.model_type, **arguments} if kind.model_type else arguments


def _token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens inside of the vocabulary."""
    ids = {name: value for name, value in SPECIAL.items() if name in fields}
    others = [n for n in fields if n.endswith(("_token_id", "_token_index", "_token_ids")) and n not in ids]
    return ids | {name: 3 + place for place, name in enumerate(others) if isinstance(fields[name].default, int)}


def tiny_model(model_type: str, kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model in bfloat16 whose layers all matter, and whose logits have a spread of SPREAD."""
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class(kind, model_type).from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} weights are not tiny: {config}")
    model = auto_class(kind, model_type).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            _randomise(part, generator)
        _spread(model, generator)
    return _in_16_bits(model, generator)


def _in_16_bits(model: PreTrainedModel, generator: torch.Generator) -> PreTrainedModel:
    """The model in bfloat16, or in float32 where its class cannot run in 16 bits."""
    model.bfloat16()
    strict = list(model._keep_in_fp32_modules_strict or ())
    wide = build_glob_alternation(strict)[0] if strict else None
    for name, parameter in model.named_parameters():
        if wide is not None and wide.search(name):
            parameter.data = parameter.data.float()
    try:
        with torch.no_grad():
            model(input_ids=tokens(generator), use_cache=False)
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        model.config.dtype = "float32"
        return model.float()
    return model


def _randomise(part: torch.nn.Module, generator: torch.Generator) -> None:
    """Matrices that keep the size of what goes through them, gains and biases that differ from channel to channel."""
    for name, parameter in part._parameters.items():
        if parameter is None or not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if isinstance(part, torch.nn.Embedding):
            parameter.copy_(noise)
        elif (parameter.dim() == 2 and name == "weight") or (parameter.dim() == 3 and parameter.shape[-1] > 16):
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        elif parameter.dim() == 1:
            parameter.add_(noise * 0.1)


def _spread(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Scale the head so that logits spread. The forward also says whether transformers can run the model on text."""
    head = model.get_output_embeddings()
    ids = tokens(generator)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if head is not None and hasattr(head, "weight") and logits.isfinite().all() and logits.std() > 0:
        head.weight.mul_(SPREAD / logits.std())


def tokens(generator: torch.Generator, sequences: int = 2, length: int = 48) -> torch.Tensor:
    """Random token ids [sequences, length], none of them special."""
    return torch.randint(60, VOCABULARY, (sequences, length), generator=generator)


def write_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """The model and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *(f"<{number}>" for number in range(3, 60)), *alphabet]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )
    wrapped.save_pretrained(folder)
