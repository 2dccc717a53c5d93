"""Scales of inputs and of the KV cache, held against what the weights before them can let through.

A norm leaves no channel larger than its gain times the root of the width, so a linear behind it has no larger input,
and keys and values are no larger than a row of their linear times that vector (Cauchy and Schwarz). Linears that read
the same input have seen the same values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.scheme import FP4_MAX, FP8_MAX
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.checking.plain import is_norm, offset_of

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "scales"
# Linears behind a norm, and those among them that read the same input, by their names in Llama's kin and in Mixtral's.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
BEHIND_A_NORM = frozenset(name for names in TOGETHER for name in names) | {"qkv_proj", "gate_up_proj", "c_attn", "c_fc"}
CODES = {"k_scale": ("k_proj", 2.0**0.5), "v_scale": ("v_proj", 1.0)}  # rotation may join two channels of a key
# A scale of inputs; and by what their E4M3 scales are divided, 6 x 448 over the largest input.
UNITS = ("input_scale", "input_global_scale")
# The largest numbers of 8 bits are 127 and 448; the smaller bound holds for both.
LEAST_LARGEST = 127.0
SLACK = 1.05


def check_inputs(
    stored: Checkpoint, plain: Checkpoint, skeleton: Any, names: Mapping[str, str], findings: Findings
) -> None:
    """stored, plain: the checkpoint and its decoded form. skeleton, names: the class, and where its parameters are."""
    _check_together(stored, findings)
    gains = _gains(plain, skeleton, names)
    for name in stored.tensors:
        module, _, role = name.rpartition(".")
        if role in UNITS and module.rpartition(".")[2] in BEHIND_A_NORM:
            bound = _of_input(plain, module, gains)
        elif role in CODES:
            bound = _of_cache(plain, module, role, gains)
        else:
            continue
        largest = _largest(role, float(stored.read(name).float().abs().max()))
        if bound is not None and largest > SLACK * bound:
            what = f"stands for values up to {largest:.3g}; norm and weights before it let through {bound:.3g} at most"
            findings.fault(CHECK, name, what)


def _largest(role: str, scale: float) -> float:
    """The largest value that a scale stands for; 0 for one of 0, which is a fault of its own."""
    if role == UNITS[1]:
        return FP4_MAX * FP8_MAX / scale if scale else 0.0
    return scale * LEAST_LARGEST


def _check_together(stored: Checkpoint, findings: Findings) -> None:
    """Scales of one input, where nearly all others are alike."""
    groups = list(_read_together(stored))
    unlike = [names for names, values in groups if max(values) != min(values)]
    if 0 < len(unlike) <= len(groups) // 3:
        what = (
            f"has another scale than the other linears that read this input, unlike {len(groups) - len(unlike)} others"
        )
        findings.fault(CHECK, unlike[0][0], what)


def _read_together(stored: Checkpoint) -> Iterator[tuple[list[str], list[float]]]:
    """Names and values of the scales of each input that several linears read."""
    parents = dict.fromkeys(
        n.rpartition(".")[0].rpartition(".")[0] for n in stored.tensors if n.rpartition(".")[2] in UNITS
    )
    for parent, linears, unit in product(parents, TOGETHER, UNITS):
        names = [f"{parent}.{each}.{unit}" for each in linears]
        names = [name for name in names if name in stored.tensors and stored.tensors[name].shape in ((), (1,))]
        if len(names) > 1:
            yield names, [float(stored.read(name).float()) for name in names]


def _gains(plain: Checkpoint, skeleton: Any, names: Mapping[str, str]) -> dict[str, list[torch.Tensor]]:
    """By block: |gain| + |bias| of each of its norms, which bound a channel of a normed vector of length root of n."""
    found: dict[str, list[torch.Tensor]] = {}
    for slot, name in names.items():
        if not (slot.endswith(".weight") and is_norm(slot) and name in plain.tensors):
            continue
        gain = (plain.read(name).float() + offset_of(skeleton.get_submodule(slot.removesuffix(".weight")))).abs()
        bias = names.get(f"{slot.removesuffix('weight')}bias")
        if bias is not None and bias in plain.tensors:
            gain = gain + plain.read(bias).float().abs()
        found.setdefault(_block(name), []).append(gain)
    return found


def _block(name: str) -> str:
    """The part of a name up to the number of the block; "" outside of blocks."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else ""


def _of_input(plain: Checkpoint, module: str, gains: Mapping[str, list[torch.Tensor]]) -> float | None:
    """Largest input behind any norm of the block; None where none has its width."""
    info = plain.tensors.get(f"{module}.weight")
    fitting = [gain for gain in gains.get(_block(f"{module}."), []) if info is not None and len(gain) in info.shape]
    return max((float(gain.max()) * len(gain) ** 0.5 for gain in fitting), default=None)


def _of_cache(plain: Checkpoint, prefix: str, role: str, gains: Mapping[str, list[torch.Tensor]]) -> float | None:
    """Largest key or value behind any norm of the block; None where its linear is not known, or normed after it."""
    linear, factor = CODES[role]
    name, bias = f"{prefix}.{linear}.weight", f"{prefix}.{linear}.bias"
    if name not in plain.tensors or any(each.startswith(f"{prefix}.k_norm") for each in plain.tensors):
        return None
    weight = plain.read(name).float()
    fitting = [gain for gain in gains.get(_block(f"{prefix}."), []) if len(gain) == weight.shape[1]]
    extra = float(plain.read(bias).float().abs().max()) if bias in plain.tensors else 0.0
    rows = [float((weight * gain).norm(dim=1).max()) * len(gain) ** 0.5 for gain in fitting]
    return (max(rows) + extra) * factor if rows else None
