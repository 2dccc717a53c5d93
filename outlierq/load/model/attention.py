"""Which module of a block is its attention, and rounding the keys and values that it sees, as an fp8 cache would.

`calibrate/attention.py` keeps statistics of the same keys and values.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.scheme import ActivationScheme

if TYPE_CHECKING:
    import torch

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
CACHE_ELEMENTS = ActivationScheme("float", dynamic=False, per="tensor")
# What a server does with a cache by itself, a scale for each token and head: `--kv-cache-dtype` of vLLM 0.32 with
# `_per_token_head`, and `nvfp4`.
SERVED_CACHES = ("fp8", "int8", "int4", "nvfp4")
NVFP4 = ActivationScheme("float", 4, False, "group", 16, "two-level")

Rounding = Callable[["torch.Tensor"], "torch.Tensor"]
# Keys, values [sequences, kv heads, tokens, D] and mask, as attention is given them.
Seen = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None"]
Change = Callable[["torch.nn.Module", "torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor | None"], Seen]


def attention_names(module: torch.nn.Module) -> list[str]:
    """Names, within `module`, of the parts that call transformers' attention interface and hold linears.

    No table of architectures: the code of a part's `forward` names the interface or it does not. Parts of a part that
    was found are not looked at.
    """
    attentions: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in attentions)
        if not inside and _calls_interface(part) and any(True for _ in part.parameters()):
            attentions.append(name)
    return attentions


def _calls_interface(part: torch.nn.Module) -> bool:
    """Whether the code of the part's own `forward` looks up an attention function."""
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    return code is not None and INTERFACE in code.co_names


def stored_prefix(module: str, names: Mapping[str, str]) -> str:
    """How the checkpoint spells the name of a module: that of a parameter inside, less what the two have in common.

    names: parameter -> stored tensor. SourceError when the module has no parameter in the checkpoint.
    """
    for slot, tensor in names.items():
        inside = slot.removeprefix(f"{module}.")
        if inside != slot and tensor.endswith(f".{inside}"):
            return tensor.removesuffix(f".{inside}")
    raise SourceError(f"no tensor of {module} is stored under its name, so its cache scales have no name")


def round_cache(model: torch.nn.Module, scales: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Round keys (after RoPE) and values to E4M3 just before attention. scales: attention module -> its (k, v) scales.

    A scale is [1] or [kv heads, 1, 1]; it broadcasts against [sequences, kv heads, tokens, head size]. The model's
    attention function stays the one that it was, with its masks.
    """
    from outlierq.ops.activations import fake_quantize

    for module, (key, value) in scales.items():
        part = model.get_submodule(module)
        part.register_buffer("k_scale", key.float(), persistent=False)
        part.register_buffer("v_scale", value.float(), persistent=False)

    def scaled(
        module: torch.nn.Module, _: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> Seen:
        if "k_scale" in module._buffers:
            key = fake_quantize(key, CACHE_ELEMENTS, module.k_scale)
            value = fake_quantize(value, CACHE_ELEMENTS, module.v_scale)
        return key, value, mask

    attend_through(model, "fp8", scaled)


def round_served_cache(model: torch.nn.Module, numbers: str, skip: Collection[int] = ()) -> dict[int, float]:
    """Round keys (after RoPE) and values just before attention as a server does by itself; see `SERVED_CACHES`.

    skip: numbers of layers that keep 16 bits. Gives, as the model runs, by layer the noise of its last call: the mean
    square of what attention scores and values change by, each over its own mean square.
    """
    rounded, noise = served_rounding(numbers), dict[int, float]()

    def change(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Seen:
        layer = getattr(module, "layer_idx", None)
        if layer in skip:
            return key, value, mask
        held = rounded(key), rounded(value)
        if layer is not None:
            weight = query.float().square().mean((0, 2)).unflatten(0, (key.shape[1], -1)).sum(1)[:, None]
            noise[layer] = _lost(held[0], key, weight) + _lost(held[1], value, 1.0)
        return *held, mask

    attend_through(model, f"served_{numbers}_{'_'.join(map(str, sorted(skip)))}", change)
    return noise


def _lost(rounded: torch.Tensor, exact: torch.Tensor, weight: torch.Tensor | float) -> float:
    """Mean square of a change over that of [sequences, heads, tokens, D]; weight: of channels, [heads, 1, D]."""
    change = (rounded.float() - exact.float()).square() * weight
    return float(change.sum() / (exact.float().square() * weight).sum().clamp(min=1e-30))


def served_rounding(numbers: str) -> Rounding:
    """How a server rounds keys or values [..., head size]: each token and head by itself, in blocks of 16 for NVFP4.

    int4 is turned by a Hadamard matrix before it is rounded (the signs are not the server's), and has a zero point.
    """
    from outlierq.ops.activations import fake_quantize

    if numbers == "int4":
        return _turned_int4
    scheme = NVFP4 if numbers == "nvfp4" else ActivationScheme("float" if numbers == "fp8" else "int")
    return lambda x: fake_quantize(x, scheme)


def _turned_int4(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., head size] turned, in 4 bits with a zero point, and turned back."""
    from outlierq.ops.hadamard import hadamard_transform

    turned = hadamard_transform(x.float())
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    zero = (-low / scale).round_().clamp_(0, 15)
    codes = (turned / scale + zero).round_().clamp_(0, 15)
    return hadamard_transform(codes.sub_(zero).mul_(scale), transpose=True).to(x.dtype)


def attend_through(model: torch.nn.Module, word: str, change: Change) -> None:
    """Have attention see what `change` makes of keys, values and mask; its function stays the one that it was.

    change: is given the module, and its queries [sequences, heads, tokens, D] before the three. word: by which this way
    of changing is known to transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    implementation = model.config.get_text_config()._attn_implementation
    name = f"outlierq_{word}_cache_{implementation}"
    AttentionInterface.register(name, _attention(implementation, change))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    for part in model.modules():
        if getattr(getattr(part, "config", None), "_attn_implementation", None) == implementation:
            part.config._attn_implementation = name


def _attention(implementation: str, change: Change) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """An attention function that changes what it is given and goes on with `implementation`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        key, value, attention_mask = change(module, query, key, value, attention_mask)
        # The plain function is that of the model's own file, as its module would have taken it.
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, plain)
        return run(module, query, key, value, attention_mask, **kwargs)

    return attention
