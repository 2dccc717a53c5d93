"""Tiny random models of every architecture that becomes a GGUF file, and their configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 288
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.1, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_hidden_layers": 3, "num_key_value_heads": 4,
}  # fmt: skip
DELTA_NET = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "num_hidden_layers": 4,
}  # fmt: skip
GEMMA4 = {
    "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 6, "sliding_window": 8, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 48}
# What each config has beside the usual sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "qwen3_next": {**DELTA_NET, **SHARED_EXPERT, "linear_num_value_heads": 4},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**DELTA_NET, **SHARED_EXPERT},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 6},
    "gemma4_text": {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},
    "phi3": {"pad_token_id": 0, "sliding_window": None},
    "glm4": {"head_dim": 32, "attention_bias": True},
    "glm4_moe": {
        "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True,
        "attention_bias": True,
    },
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "num_hidden_layers": 27},
    "deepseek_v3": {**DEEPSEEK, "n_group": 1, "topk_group": 1},
    "gpt_oss": {
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 8,
    },
    "granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
    "starcoder2": {"sliding_window": None, "use_bias": True},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "exaone4": {"sliding_window": 8, "num_hidden_layers": 64, "sliding_window_pattern": 4},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
}  # fmt: skip


def write_model(folder: Path, model_type: str, *, seed: int = 0, dtype: str = "float32", **more: Any) -> Path:
    """A random model of this type with gains and biases that are no ones and zeros, as transformers saves it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **CONFIGS[model_type], **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.mul_(0.8)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Bytes and a few words, byte-level: llama.cpp reads no vocabulary without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    wrapped.save_pretrained(folder)
