"""Tiny checkpoints as other programs compress them, each beside its exact dequantization, by arithmetic of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# (name of the weight, its values) -> what is stored, by name, and the float32 values that it stands for.
Coder = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Pair:
    """compressed: the folder as it would be downloaded. dense: a plain folder of what it serves."""

    compressed: Path
    dense: Path


def is_linear(name: str) -> bool:
    """Whether a tensor is a linear of a block."""
    return name.endswith("proj.weight")


def write_pair(
    plain: Path,
    out: Path,
    coder: Coder,
    description: dict[str, Any] | None,
    *,
    key: str = "quantization_config",
    chosen: Callable[[str], bool] = is_linear,
    extra: dict[str, torch.Tensor] | None = None,
) -> Pair:
    """The folder `plain` with its chosen weights compressed, and the same with what these stand for, in its dtype."""
    pair = Pair(out / "compressed", out / "dense")
    for folder in (pair.compressed, pair.dense):
        shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    stored, dense = dict(tensors), dict(tensors)
    for name in filter(chosen, tensors):
        parts, values = coder(name, tensors[name].float())
        del stored[name]
        stored |= {part: value.contiguous() for part, value in parts.items()}
        dense[name] = values.to(tensors[name].dtype).contiguous()
    save_file(stored | (extra or {}), pair.compressed / "model.safetensors", {"format": "pt"})
    save_file(dense, pair.dense / "model.safetensors", {"format": "pt"})
    if description is not None:
        edit_config(pair.compressed, **{key: description})
    return pair


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def weight_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file and of config.json."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    return {path.name: path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------------------ FP8


def fp8_blocks(block: int, *, suffix: str = "weight_scale_inv", powers: bool = False, dtype: str = "float32") -> Coder:
    """Blocks of block x block weights, ragged at the edges; scale = largest / 448, or the next power of two."""

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = weight.shape
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        values = torch.empty(rows, columns)
        scales = torch.empty(-(-rows // block), -(-columns // block))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                scale = weight[part].abs().max() / 448
                scale = scale.log2().ceil().exp2() if powers else scale.to(getattr(torch, dtype)).float()
                codes[part] = (weight[part] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                values[part] = codes[part].float() * scale
                scales[i, j] = scale
        stem = name.removesuffix("weight")
        return {name: codes, f"{stem}{suffix}": scales.to(getattr(torch, dtype))}, values

    return code


def fp8_scaled(per: str, *, suffix: str = "weight_scale", inputs: bool = False) -> Coder:
    """One scale a weight ("tensor") or a row ("channel")."""

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scale = weight.abs().max() / 448 if per == "tensor" else weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        stem = name.removesuffix("weight")
        parts = {name: codes, f"{stem}{suffix}": scale}
        return parts | ({f"{stem}input_scale": torch.tensor(0.02)} if inputs else {}), codes.float() * scale

    return code


# -------------------------------------------------------------------------------------------------------- 4-bit floats

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e2m1_codes(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest of the 16 codes, uint8."""
    nearest = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    return (nearest + 8 * (scaled < 0)).to(torch.uint8)


def e2m1_numbers(codes: torch.Tensor) -> torch.Tensor:
    """What codes stand for."""
    return torch.cat([E2M1, -E2M1])[codes.long()]


def in_pairs(codes: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Two codes a byte along the last dimension, the earlier one in the low half."""
    first, second = codes[..., ::2], codes[..., 1::2]
    return first << 4 | second if high_first else first | second << 4


def modelopt_nvfp4(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As ModelOpt stores it: E4M3 scales of 16 columns in units of a float32 that multiplies."""
    grouped = weight.view(len(weight), -1, 16)
    unit = weight.abs().max() / (6 * 448)
    scale = (grouped.abs().amax(-1) / 6 / unit).to(torch.float8_e4m3fn)
    factor = (scale.float() * unit)[..., None]
    codes = e2m1_codes(grouped / factor)
    stem = name.removesuffix("weight")
    parts = {name: in_pairs(codes).flatten(1), f"{stem}weight_scale": scale, f"{stem}weight_scale_2": unit}
    parts[f"{stem}input_scale"] = torch.tensor(0.01)
    return parts, (e2m1_numbers(codes) * factor).view_as(weight)


def mxfp4_experts(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As gpt-oss stores experts [E, in, out]: blocks [E, out, groups, 16] and exponents [E, out, groups]."""
    grouped = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = grouped.abs().amax(-1).log2().floor() - 2
    codes = e2m1_codes(grouped / exponent.exp2()[..., None])
    values = e2m1_numbers(codes) * exponent.exp2()[..., None]
    parts = {f"{name}_blocks": in_pairs(codes), f"{name}_scales": (exponent + 127).to(torch.uint8)}
    return parts, values.flatten(-2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ integers


def in_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n * bits / 32] of codes [rows, n]: one string of bits, lowest first, by a slow loop over bits."""
    rows, count = codes.shape
    string = torch.stack([codes.long() >> bit & 1 for bit in range(bits)], -1).view(rows, count * bits // 32, 32)
    words = (string << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def affine(weight: torch.Tensor, bits: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(codes, scale, minimum) of groups of columns, numbers in a dtype."""
    grouped = weight.view(len(weight), -1, size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / ((1 << bits) - 1)).to(dtype)
    low = low.to(dtype)
    codes = ((grouped - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, (1 << bits) - 1)
    return codes.to(torch.uint8), scale, low


def mlx(bits: int, size: int, *, biases: str = "biases") -> Coder:
    """uint32 words, scales and biases."""

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes, scale, low = affine(weight, bits, size, torch.bfloat16)
        values = codes.float() * scale.float()[..., None] + low.float()[..., None]
        stem = name.removesuffix("weight")
        parts = {name: in_words(codes.flatten(1), bits).view(torch.uint32), f"{stem}scales": scale}
        return parts | {f"{stem}{biases}": low}, values.view_as(weight)

    return code


def gptq_layout(size: int, *, less: int, index: bool = False) -> Coder:
    """4-bit words down the columns; `less` is taken from the stored zero points (1 in version 1)."""

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        grouped = weight.view(len(weight), -1, size)
        scale = ((grouped.amax(-1) - grouped.amin(-1)) / 15).half()
        zero = (-grouped.amin(-1) / scale.float()).round().clamp(1, 15)
        codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
        values = (codes - zero[..., None]) * scale.float()[..., None]
        stem = name.removesuffix("weight")
        parts = {
            f"{stem}qweight": in_words(codes.flatten(1).byte(), 4).T,
            f"{stem}qzeros": in_words((zero - less).T.byte(), 4),
            f"{stem}scales": scale.T,
        }
        parts |= {f"{stem}g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // size} if index else {}
        return parts, values.view_as(weight)

    return code


def awq_layout(size: int) -> Coder:
    """4-bit words along the rows, in AutoAWQ's order of halves."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def words(codes: torch.Tensor) -> torch.Tensor:
        return in_words(codes.view(len(codes), -1, 8)[..., order].flatten(1).byte(), 4)

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        grouped = weight.view(len(weight), -1, size)
        scale = ((grouped.amax(-1) - grouped.amin(-1)) / 15).half()
        zero = (-grouped.amin(-1) / scale.float()).round().clamp(0, 15)
        codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
        values = (codes - zero[..., None]) * scale.float()[..., None]
        stem = name.removesuffix("weight")
        parts = {f"{stem}qweight": words(codes.flatten(1).T), f"{stem}qzeros": words(zero.T), f"{stem}scales": scale.T}
        return parts, values.view_as(weight)

    return code


def pack_quantized(size: int) -> Coder:
    """compressed-tensors in 4 bits without zero points: codes plus 8 in words along the columns."""

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        grouped = weight.view(len(weight), -1, size)
        scale = (grouped.abs().amax(-1) / 7.5).bfloat16()
        codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7)
        stem = name.removesuffix("weight")
        parts = {f"{stem}weight_packed": in_words((codes + 8).flatten(1).byte(), 4), f"{stem}weight_scale": scale}
        parts[f"{stem}weight_shape"] = torch.tensor(weight.shape)
        return parts, (codes * scale.float()[..., None]).view_as(weight)

    return code


# -------------------------------------------------------------------------------------------------------- bitsandbytes

NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip

FP4 = torch.tensor([0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25])
TABLES = {"nf4": NF4, "fp4": torch.cat([FP4, -FP4])}  # of bitsandbytes' codes


def four_bit(kind: str = "nf4", *, nested: bool = False, blocksize: int = 64) -> Coder:
    """bitsandbytes in 4 bits; nested: the scales are bytes of a table, too."""

    def code(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        blocks, numbers = weight.reshape(-1, blocksize), TABLES[kind]
        scale, state = blocks.abs().amax(1), {"quant_type": kind, "blocksize": blocksize, "dtype": "bfloat16"}
        state["shape"] = list(weight.shape)
        parts: dict[str, torch.Tensor] = {f"{name}.quant_map": numbers.clone(), f"{name}.absmax": scale}
        if nested:
            table, offset = torch.linspace(-1, 1, 256), scale.mean().item()
            outer = torch.stack([part.abs().max() for part in (scale - offset).split(32)])
            spread = outer.repeat_interleave(32)[: len(scale)]
            places = ((scale - offset) / spread).sub(table[:, None]).abs().argmin(0).to(torch.uint8)
            scale = table[places.long()] * spread + torch.tensor(offset)
            state |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": offset}
            parts |= {
                f"{name}.absmax": places,
                f"{name}.nested_absmax": outer,
                f"{name}.nested_quant_map": table.clone(),
            }
        codes = (blocks / scale[:, None])[..., None].sub(numbers).abs().argmin(-1).to(torch.uint8)
        parts[name] = in_pairs(codes.flatten(), high_first=True)[:, None]
        text = json.dumps(state).encode()
        parts[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return parts, (numbers[codes.long()] * scale[:, None]).view_as(weight)

    return code
