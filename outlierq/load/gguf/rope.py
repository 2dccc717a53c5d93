"""Rotary scaling of a GGUF file, which transformers' GGUF tables leave out: restored in the config, or refused."""

from __future__ import annotations

from math import pi
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.load.gguf.file import WITHOUT_A_CLASS, GgufHeader, dequantized

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Llama 3.1 and 3.2 differ in `factor` only; the rest is the same in every published config of the family.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def restore_rope(header: GgufHeader, config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` for the config when the file scales its rotary embedding, else nothing.

    SourceError when the scaling is of a kind that cannot be restored with certainty.
    """
    theta = config.get("rope_theta", 10000.0)
    if "rope_freqs.weight" in header.tensors:
        return _llama3(header, config, theta)
    factors = [name for name in ROPE_FACTORS if name in header.tensors]
    kind = header.fields.get(f"{header.fields['general.architecture']}.rope.scaling.type", "none")
    if factors or kind not in ("none", "linear", "yarn"):
        raise _unknown(header, f"{kind} scaling {', '.join(factors)}".strip())
    return _declared(header, kind, theta) if kind != "none" else {}


def _declared(header: GgufHeader, kind: str, theta: float) -> dict[str, Any]:
    """Linear or YaRN scaling as the metadata declares it."""
    prefix = f"{header.fields['general.architecture']}.rope.scaling"
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": header.fields.get(f"{prefix}.factor")}
    original = header.fields.get(f"{prefix}.original_context_length")
    if rope["factor"] is None or (kind == "yarn" and original is None):
        raise _unknown(header, f"{kind} scaling without factor and original context length")
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
    return {"rope_parameters": rope}


def _llama3(header: GgufHeader, config: dict[str, Any], theta: float) -> dict[str, Any]:
    """Llama 3 scaling, taken only when its formula gives back the factors that the file stores."""
    import torch

    stored = dequantized(header.tensors["rope_freqs.weight"], torch.float32).flatten()
    if bool((stored == 1).all()):
        return {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    factor = float(stored.max())
    expected = torch.tensor([_llama3_factor(i, head_dim, theta, factor) for i in range(head_dim // 2)])
    if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=1e-4):
        raise _unknown(header, "factors in rope_freqs.weight that are not Llama 3's")
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}}


def _llama3_factor(index: int, head_dim: int, theta: float, factor: float) -> float:
    """By how much Llama 3 divides rotary frequency `index`: 1 for short waves, `factor` for long ones, between else."""
    wavelength = 2 * pi * theta ** (2 * index / head_dim)
    turns = LLAMA3["original_max_position_embeddings"] / wavelength
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def _unknown(header: GgufHeader, what: str) -> SourceError:
    """The refusal of a scaling that would be lost."""
    return SourceError(
        f"{header.path.name} changes its rotary embedding in a way that cannot be restored: {what}",
        hint=WITHOUT_A_CLASS,
    )
