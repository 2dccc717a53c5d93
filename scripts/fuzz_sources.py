"""Checkpoints as other programs publish them, for the readers that decode them: one valid case of each method.

A case is the quantization_config, and dtype and shape of the tensors, as for the reader "packed" of `fuzz_readers.py`.
"""

from __future__ import annotations

import json
from typing import Any

UP, EXPERTS = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts"
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 16]}

FP8: list[tuple[dict[str, Any], dict[str, tuple]]] = [
    (
        {"quant_method": "fp8", "weight_block_size": [4, 4], "activation_scheme": "dynamic"},
        {f"{UP}.weight": ("F8_E4M3", 8, 8), f"{UP}.weight_scale_inv": ("F32", 2, 2)},
    ),
    (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        {f"{UP}.weight": ("F8_E4M3", 8, 8), f"{UP}.weight_scale": ("F32",), f"{UP}.input_scale": ("F32",)},
    ),
    (
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"], "activation_scale_ub": 1200.0},
        {f"{UP}.weight": ("F8_E4M3", 8, 8), f"{UP}.weight_scale": ("F32", 8, 1)},
    ),
]
FLOAT4: list[tuple[dict[str, Any], dict[str, tuple]]] = [
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]},
        {
            f"{UP}.weight": ("U8", 8, 8), f"{UP}.weight_scale": ("F8_E4M3", 8, 1),
            f"{UP}.weight_scale_2": ("F32",), f"{UP}.input_scale": ("F32",),
        },
    ),
    (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {f"{UP}.weight": ("F8_E4M3", 8, 8), f"{UP}.weight_scale": ("F32",), f"{UP}.input_scale": ("F32",)},
    ),
    (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {f"{EXPERTS}.gate_up_proj_blocks": ("U8", 2, 8, 1, 16), f"{EXPERTS}.gate_up_proj_scales": ("U8", 2, 8, 1)},
    ),
    (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"a": {
            "targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}}}},
        {f"{UP}.weight_packed": ("U8", 8, 8), f"{UP}.weight_scale": ("F8_E4M3", 8, 1),
         f"{UP}.weight_global_scale": ("F32", 1)},
    ),
]  # fmt: skip
INTEGERS: list[tuple[dict[str, Any], dict[str, tuple]]] = [
    (
        {"quant_method": "auto-round", "bits": 4, "group_size": 8, "sym": True, "data_type": "int",
         "packing_format": "auto_round:auto_gptq", "extra_config": {"lm_head": {"bits": 16}}},
        {f"{UP}.qweight": ("I32", 2, 16), f"{UP}.qzeros": ("I32", 2, 2), f"{UP}.scales": ("F16", 2, 16)},
    ),
    (
        {"quant_method": "auto-round", "bits": 4, "group_size": 8, "packing_format": "auto_round:auto_awq"},
        {f"{UP}.qweight": ("I32", 16, 2), f"{UP}.qzeros": ("I32", 2, 2), f"{UP}.scales": ("F16", 2, 16)},
    ),
    (
        {"bits": 4, "group_size": 8, "mode": "affine", UP: {"bits": 8, "group_size": 8}},
        {f"{UP}.weight": ("U32", 8, 4), f"{UP}.scales": ("BF16", 8, 2), f"{UP}.biases": ("BF16", 8, 2)},
    ),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {f"{UP}.weight": ("U8", 64, 1), f"{UP}.weight.absmax": ("F32", 2), f"{UP}.weight.quant_map": ("F32", 16),
         f"{UP}.weight.quant_state.bitsandbytes__nf4": ("U8", len(json.dumps(STATE)))},
    ),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {f"{UP}.weight": ("U8", 64, 1), f"{UP}.weight.absmax": ("F32", 2), f"{UP}.weight.quant_map": ("F32", 16),
         f"{UP}.weight.quant_state.bitsandbytes__fp4": ("U8", len(json.dumps(STATE)))},
    ),
]  # fmt: skip
CASES = [*FP8, *FLOAT4, *INTEGERS]


def state_bytes(raw: bytes) -> bytes:
    """What describes a 4-bit weight of bitsandbytes, in as many bytes as there are."""
    return json.dumps(STATE).encode()[: len(raw)].ljust(len(raw))
