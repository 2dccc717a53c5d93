"""Keys and values of an attention cache in 4 or 8 bits: x = code * scale + minimum, in groups; KIVI (arXiv:2402.02750).

Values are quantized per token (groups along the head dimension), keys per channel (groups of successive tokens): the
outliers of keys keep to channels. Scale and minimum have the dtype of x and are rounded before codes are derived.
"""

from __future__ import annotations

import torch

GROUP_SIZES = (32, 64, 128, 256)
SMALLEST = torch.finfo(torch.float32).tiny


def kv_quant(
    x: torch.Tensor, *, bits: int = 4, per: str = "token", group_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, minimum) of `x` [rows, width], rows being tokens of one head after the other.

    codes: uint8 [rows, width * bits / 8]; with 4 bits the even column is the low nibble. scale, minimum: [rows,
    width / group_size] per token, [rows / group_size, width] per channel. A constant group has scale 1.
    """
    top = (1 << bits) - 1
    grouped = _in_groups(x.float(), per, group_size)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale, minimum = ((high - low) / top).to(x.dtype), low.to(x.dtype)
    scale = torch.where(scale.float() < SMALLEST, torch.ones_like(scale), scale)
    codes = ((grouped - minimum.float()[..., None]) / scale.float()[..., None]).round_().nan_to_num_(0.0).clamp_(0, top)
    codes = _from_groups(codes, per).to(torch.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes, scale, minimum


def kv_dequant(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, *, bits: int = 4, per: str = "token"
) -> torch.Tensor:
    """[rows, width] in the dtype of the scales; the inverse of `kv_quant` but for half a step."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    width = codes.shape[1] // scale.shape[1] if per == "token" else codes.shape[0] // scale.shape[0]
    grouped = _in_groups(codes.float(), per, width)
    return _from_groups(grouped * scale.float()[..., None] + minimum.float()[..., None], per).to(scale.dtype)


def _in_groups(x: torch.Tensor, per: str, size: int) -> torch.Tensor:
    """[rows, groups, size] per token, [groups, width, size] per channel."""
    if per == "token":
        return torch.unflatten(x, 1, (-1, size))
    return torch.unflatten(x, 0, (-1, size)).transpose(1, 2)


def _from_groups(grouped: torch.Tensor, per: str) -> torch.Tensor:
    """The inverse of `_in_groups`."""
    return grouped.flatten(1) if per == "token" else grouped.transpose(1, 2).flatten(0, 1)
