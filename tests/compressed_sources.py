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
