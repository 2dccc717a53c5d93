"""Turn a 4-bit checkpoint of any of the tools into a dense float32 model, so that all are evaluated by the same code.

Reads compressed-tensors pack-quantized, GPTQ (v1 and v2) and AWQ gemm. In all three, codes and zero points are unsigned
4-bit numbers, eight to an int32 word, and W = (code - zero) * scale; they differ in which numbers share a word.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

IN_ORDER = torch.arange(8)
AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # nibble that holds column 0, 1, 2, ... of a word
GPTQ_V1_OFFSET = 0x11111111  # version 1 stores each zero point minus one


def unpack(words: Tensor, order: Tensor = IN_ORDER) -> Tensor:
    """Eight numbers per int32 word along the last axis: [..., n] -> [..., 8 n], values 0 to 15."""
    nibbles = (words.unsqueeze(-1) >> (4 * order).int()) & 15
    return nibbles.flatten(-2)


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor, group_of_column: Tensor) -> Tensor:
    """W = (code - zero) * scale. codes: [out, in]; zeros, scales: [out, groups]; group_of_column: [in]."""
    zeros, scales = zeros.float(), scales.float()
    return (codes.float() - zeros[:, group_of_column]) * scales[:, group_of_column]


def decode_pack_quantized(part: dict[str, Tensor], config: dict) -> Tensor:
    """compressed-tensors: codes packed along the inputs; zero points along the outputs, absent where symmetric (8)."""
    scheme = packed_scheme(config)
    rows, columns = part["weight_shape"].tolist()
    codes = unpack(part["weight_packed"])[:, :columns]
    scales = part["weight_scale"]
    zeros = torch.full(scales.shape, 8)
    if not scheme["symmetric"]:
        zeros = unpack(part["weight_zero_point"].T).T[:rows]
    groups = part.get("weight_g_idx", torch.arange(columns) // (columns // scales.shape[1]))
    return dequantize(codes, zeros, scales, groups)


def packed_scheme(config: dict) -> dict:
    """The weight settings of a checkpoint whose layers all share one 4-bit scheme."""
    schemes = [group["weights"] for group in config["config_groups"].values()]
    if len(schemes) != 1 or config["format"] != "pack-quantized" or schemes[0]["num_bits"] != 4:
        raise ValueError("only checkpoints of one 4-bit pack-quantized scheme can be decoded")
    return schemes[0]


def decode_gptq(part: dict[str, Tensor], config: dict) -> Tensor:
    """GPTQ: codes packed along the inputs [in / 8, out], zero points along the outputs [groups, out / 8]."""
    words = part["qzeros"]
    if config.get("checkpoint_format", "gptq") == "gptq":
        words = words + GPTQ_V1_OFFSET
    return dequantize(unpack(part["qweight"].T), unpack(words).T, part["scales"].T, part["g_idx"].long())


def decode_awq(part: dict[str, Tensor], config: dict) -> Tensor:
    """AWQ gemm: codes [in, out / 8] and zero points [groups, out / 8], both packed along the outputs in AWQ's order."""
    codes = unpack(part["qweight"], AWQ_ORDER).T
    scales = part["scales"].T
    groups = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return dequantize(codes, unpack(part["qzeros"], AWQ_ORDER).T, scales, groups)


DECODERS = {"compressed-tensors": decode_pack_quantized, "gptq": decode_gptq, "awq": decode_awq}
PACKED_NAMES = {
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("qweight", "qzeros", "scales", "g_idx"),
}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def dense_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder, quantized or not, as float32 tensors under their dense names."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    state, packed = {}, {}
    for name, tensor in read_tensors(folder).items():
        module, _, last = name.rpartition(".")
        if config and last in PACKED_NAMES:
            packed.setdefault(module, {})[last] = tensor
        else:
            state[name] = tensor.float()
    for module, part in packed.items():
        state[f"{module}.weight"] = DECODERS[config["quant_method"]](part, config)
    return state


def load_dense(folder: Path) -> nn.Module:
    """The model in `folder` with dense float32 weights. Raises ValueError if a weight is missing or left over."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense_state(folder), strict=False)
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing weights {missing}, unexpected weights {unexpected}")
    model.tie_weights()
    return model.eval()
