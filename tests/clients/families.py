"""Tiny random models of the families that are served most, in shapes that servers' kernels take, and their exports."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.jobs import smollm2_tokenizer

SHAPE = {
    "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
PLACES = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
SIGHT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
QWEN_SIGHT = {
    "depth": 2, "num_heads": 2, "hidden_size": 64, "intermediate_size": 128, "patch_size": 14, "out_hidden_size": 256,
    "num_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": 128,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 128,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",  # as published configs say; transformers knows no other
}  # fmt: skip
# Rows of merged layers are multiples of 32: 2 x 16 of in_proj_b and in_proj_a, 2208 of the in_proj of a mixer.
LINEAR = {
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "partial_rotary_factor": 0.25}
SSM = {
    "mamba_d_ssm": 1024, "mamba_n_heads": 32, "mamba_d_head": 32, "mamba_d_state": 64, "mamba_n_groups": 1,
    "mamba_expand": 4, "mamba_chunk_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class of transformers and the config of a tiny one.

    settings: of the config. parts: settings of the configs inside of it. fused: all experts of a block in one tensor.
    extra: adds tensors that the class does not read, to those that it stores. options: keywords for vLLM.
    """

    name: str
    settings: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    class_name: str = ""
    fused: bool = False
    extra: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def mtp_layer(tensors: dict[str, Any]) -> dict[str, Any]:
    """The block behind the last one that predicts one token more, as DeepSeek-V3 stores it: a copy and a projection."""
    import torch

    count = SHAPE["num_hidden_layers"]
    last, extra = f"model.layers.{count - 1}.", f"model.layers.{count}."
    block = {extra + name.removeprefix(last): value.clone() for name, value in tensors.items() if name.startswith(last)}
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return {
        **block,
        extra + "enorm.weight": tensors["model.norm.weight"].clone(),
        extra + "hnorm.weight": tensors["model.norm.weight"].clone(),
        extra + "eh_proj.weight": torch.randn(256, 512).to(torch.bfloat16) * 0.08,
        extra + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        extra + "shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        extra + "shared_head.head.weight": head.clone(),
    }


NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
# The kernel of vLLM 0.32's CPU build turns queries of several heads wrongly where pairs lie side by side.
OWN_ROPE = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
DRAFTS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
DEEPSEEK = {**SHAPE, **LATENT, **ROUTED, "first_k_dense_replace": 1, "tie_word_embeddings": False}
FAMILIES = {
    "mixtral": Family("Mixtral", {**SHAPE, "intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3-moe": Family("Qwen3Moe", {**SHAPE, **EXPERTS}),
    "qwen3-moe-fused": Family("Qwen3Moe", {**SHAPE, **EXPERTS}, fused=True),
    "qwen3-moe-160": Family("Qwen3Moe", {**SHAPE, **EXPERTS, "moe_intermediate_size": 160}),
    "gpt-oss": Family("GptOss", {**SHAPE, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 128,
                                 "tie_word_embeddings": False}),
    "qwen3.5": Family(
        "Qwen3_5", {**PLACES, "tie_word_embeddings": True},
        {"text_config": {**SHAPE, **LINEAR, "rope_parameters": MROPE}, "vision_config": QWEN_SIGHT},
        "Qwen3_5ForConditionalGeneration", options=NO_IMAGES,
    ),
    "deepseek-v3-mtp": Family(
        "DeepseekV3",
        {**DEEPSEEK, "num_nextn_predict_layers": 1},
        extra=mtp_layer,
        options={**OWN_ROPE, **DRAFTS},
    ),
    "gemma-3": Family("Gemma3", {**SHAPE, "sliding_window": 128, "query_pre_attn_scalar": 64},
                      class_name="Gemma3ForCausalLM"),
    "gemma-3-vision": Family(
        "Gemma3", {"mm_tokens_per_image": 4, "image_token_index": 3, "boi_token_index": 5, "eoi_token_index": 6},
        {"text_config": {**SHAPE, "sliding_window": 128, "query_pre_attn_scalar": 64},
         "vision_config": {**SIGHT, "model_type": "siglip_vision_model"}},
        "Gemma3ForConditionalGeneration", options=NO_IMAGES,
    ),
    "gemma-4": Family(
        "Gemma4", {**SHAPE, "vocab_size_per_layer_input": 49152, "hidden_size_per_layer_input": 64,
                   "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 128,
                   "num_kv_shared_layers": 0, "sliding_window": 128},
        class_name="Gemma4ForCausalLM",
    ),
    "falcon-h1": Family("FalconH1", {**SHAPE, **SSM}),
    "granite-hybrid": Family(
        "GraniteMoeHybrid",
        {**SHAPE, **SSM, "num_local_experts": 0, "shared_intermediate_size": 256,
         "layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
    ),
}  # fmt: skip


W4, W8A8 = ("rtn-w4", ("quantize.group_size=64",)), ("w8a8-dynamic", ())
KEPT = 'quantize.ignore=["*lm_head", "*.experts.*"]'
KEPT_TOO = 'quantize.ignore=["*lm_head", "*.experts.*", "*.kv_b_proj"]'
OTHER = "quantize.overrides=[{match: '*.experts.*.down_proj', group_size: 32}]"
IN_GROUPS = "quantize={method: rtn, bits: 4, group_size: 64}"
FEW = ("calibration.samples=8", "calibration.sequence_length=128")
# Name -> family, recipe, settings.
EXPORTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **{f"{name}-w4": (name, *W4) for name in FAMILIES},
    **{f"{name}-w8a8": (name, *W8A8) for name in FAMILIES},
    "deepseek-v3-mtp-kept-w4": ("deepseek-v3-mtp", "rtn-w4", ("quantize.group_size=64", KEPT)),
    "deepseek-v3-mtp-kept-w8a8": ("deepseek-v3-mtp", "w8a8-dynamic", (KEPT_TOO,)),
    "gpt-oss-mxfp4": ("gpt-oss", "mxfp4", ("export.format=mxfp4",)),
    "qwen3-moe-two-schemes-w4": ("qwen3-moe", "rtn-w4", ("quantize.group_size=64", OTHER)),
    "qwen3-moe-pruned-w4": ("qwen3-moe", "reap", (*FEW, IN_GROUPS, "export.format=compressed-tensors")),
}


def write_model(name: str, folder: Path) -> Path:
    """A model in bfloat16 with the tokenizer of SmolLM2. Its text is nonsense, which no comparison minds."""
    import torch
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, family.class_name or f"{family.name}ForCausalLM")(config_of(family)).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" in part:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1 and part.endswith("bias"):
                parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    if family.fused or family.extra:
        rewrite(folder, family)
    smollm2_tokenizer().save_pretrained(folder)
    return folder


def config_of(family: Family) -> Any:
    """The config of a tiny model."""
    import transformers

    name = f"{family.name}TextConfig" if family.class_name.endswith("ForCausalLM") else f"{family.name}Config"
    return getattr(transformers, name)(**family.settings, **family.parts)


def rewrite(folder: Path, family: Family) -> None:
    """Store the tensors that the class does not read, and all experts of a block in two tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    if family.extra:
        tensors |= family.extra(tensors)
    save_file(fused(tensors) if family.fused else tensors, folder / "model.safetensors", {"format": "pt"})


def fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same with `gate_up_proj` and `down_proj` of all experts of a block."""
    import torch

    experts: dict[str, dict[str, dict[int, Any]]] = {}
    for name in [name for name in tensors if re.search(r"\.experts\.\d+\.", name)]:
        module, number, leaf = name.removesuffix(".weight").rsplit(".", 2)
        experts.setdefault(module, {}).setdefault(leaf, {})[int(number)] = tensors.pop(name)
    for module, leaves in experts.items():
        gate, up, down = (torch.stack([leaves[leaf][e] for e in sorted(leaves[leaf])])
                          for leaf in ("gate_proj", "up_proj", "down_proj"))  # fmt: skip
        tensors[f"{module}.gate_up_proj"], tensors[f"{module}.down_proj"] = torch.cat([gate, up], 1), down
    return tensors


@dataclass(frozen=True)
class Exported:
    """A checkpoint and what the plan says of clients."""

    folder: Path
    said: list[str]

    def says(self, client: str) -> bool:
        """Whether the plan says that a client loads it; experts, where there are any, too."""
        lines = [line for line in self.said if line.startswith(client)]
        assert lines
        return all(": loads" in line for line in lines)


def export(name: str, work: Path) -> Exported:
    """Write an export below `work`."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.block.expert_stats import expert_stats
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    family, recipe, settings = EXPORTS[name]
    source, chosen = open_checkpoint(str(write_model(family, work / family))), load(recipe, list(settings))
    plan = make_plan(source, chosen, expert_stats=expert_stats(source, chosen, work / name))
    quantize(plan, work / name)
    return Exported(work / name, plan.clients)
