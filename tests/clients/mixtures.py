"""Random mixtures of experts in shapes that servers take, and what is exported of them."""

from __future__ import annotations

from pathlib import Path

from clients.jobs import smollm2_tokenizer

SHAPE = {
    "vocab_size": 49152, "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.08, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {"Mixtral": {"num_local_experts": 8}, "Qwen3Moe": {"num_experts": 8, "norm_topk_prob": True}}
IN_GROUPS = "quantize={method: rtn, bits: 4, group_size: 64}"
FEW = ("calibration.samples=8", "calibration.sequence_length=128")
# Name -> family, recipe, settings.
EXPORTS = {
    "Mixtral-w4": ("Mixtral", "rtn-w4", ("quantize.group_size=64",)),
    "Qwen3Moe-w8a8": ("Qwen3Moe", "w8a8-dynamic", ()),
    "Qwen3Moe-pruned-w4": ("Qwen3Moe", "reap", (*FEW, IN_GROUPS, "export.format=compressed-tensors")),
}


def write_mixture(family: str, folder: Path) -> Path:
    """A mixture in bfloat16 with the tokenizer of SmolLM2. Its text is nonsense, which no comparison minds."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    smollm2_tokenizer().save_pretrained(folder)
    return folder


def export(name: str, work: Path) -> Path:
    """The folder of an export, below `work`."""
    from outlierq.load import open_checkpoint
    from outlierq.pipeline.expert_stats import expert_stats
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.recipe import load

    family, recipe, settings = EXPORTS[name]
    source, chosen = open_checkpoint(str(write_mixture(family, work / family))), load(recipe, list(settings))
    by = expert_stats(source, chosen, work / name)
    quantize(make_plan(source, chosen, expert_stats=by), work / name)
    return work / name
