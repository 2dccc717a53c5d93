"""Quantized inputs as a checkpoint's config describes them, and running them: each linear's input is rounded first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from outlierq.core.scheme import ActivationScheme

if TYPE_CHECKING:
    import torch

# (type, dynamic, strategy) -> supported; group sizes are those of the config.
STRATEGIES = {("token", True), ("tensor", False), ("group", True), ("tensor", True)}

NUMBERS = {("int", 4), ("int", 8), ("float", 8)}
# (type, bits, strategy, dynamic, group_size) -> how scales are stored.
BLOCKS: dict[tuple[Any, ...], Literal["two-level", "power-of-two"]] = {
    ("float", 4, "tensor_group", "local", 16): "two-level",
    ("float", 4, "group", True, 32): "power-of-two",
    ("float", 8, "group", True, 32): "power-of-two",
}


def input_scheme(described: Mapping[str, Any] | None) -> ActivationScheme | str | None:
    """The scheme of a compressed-tensors `input_activations`; None for 16 bits, or why it cannot be run here."""
    if not described:
        return None
    bits, kind = described.get("num_bits"), described.get("type")
    per, dynamic = described.get("strategy"), described.get("dynamic")
    size = described.get("group_size")
    scales = BLOCKS.get((kind, bits, per, dynamic, size)) if described.get("symmetric", True) else None
    if scales == "two-level" or (scales and "uint8" in str(described.get("scale_dtype"))):
        return ActivationScheme("float", bits, dynamic is True, "group", size, scales)
    if (kind, bits) not in NUMBERS or (per, dynamic) not in STRATEGIES:
        how = "dynamic" if dynamic is True else "static" if dynamic is False else dynamic
        return f"inputs of {bits}-bit {kind} numbers per {per} ({how})"
    if not described.get("symmetric", True):
        return "inputs with zero points"
    return ActivationScheme(kind, bits, dynamic, per, size or ActivationScheme.group_size)


def round_inputs(model: torch.nn.Module, schemes: Mapping[str, tuple[ActivationScheme, torch.Tensor | None]]) -> None:
    """Round the input of every named linear as its scheme says. schemes: module -> (scheme, [1] scale if static)."""
    for name, (scheme, scale) in schemes.items():
        model.get_submodule(name).register_forward_pre_hook(_rounding(scheme, scale))


def _rounding(
    scheme: ActivationScheme, scale: torch.Tensor | None
) -> Callable[[torch.nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that rounds the first argument."""
    from outlierq.ops.activations import fake_quantize

    def hook(part: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (fake_quantize(x, scheme, None if scale is None else scale.to(x.device)), *args[1:])

    return hook
