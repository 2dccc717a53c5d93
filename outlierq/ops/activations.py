"""Quantized activations: what a linear's input becomes at run time, in plain torch; every backend follows it."""

from __future__ import annotations

import torch

from outlierq.core.scheme import FP8_MAX, ActivationScheme

SMALLEST = torch.finfo(torch.float32).tiny


def fake_quantize(x: torch.Tensor, scheme: ActivationScheme, scale: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] rounded to the scheme's grid and back, in the dtype of `x`.

    scale: [1] of a static scheme; a dynamic one takes max|x| / code_max over its token, group of columns or tensor
    (1 where that is no normal number, as where all values are 0).
    """
    wide = x.float()
    if scheme.per == "group":
        grouped = _in_groups(wide, scheme.group_size)
        rounded = round_to_grid(grouped, dynamic_scale(grouped, scheme), scheme).flatten(-2)
        return rounded[..., : x.shape[-1]].to(x.dtype)
    if scale is None:
        scale = dynamic_scale(wide, scheme)
    return round_to_grid(wide, scale.float(), scheme).to(x.dtype)


def dynamic_scale(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """Scale that just holds the largest value of x [..., K]: [..., 1] per token or group, [] for the whole tensor."""
    largest = x.abs().amax() if scheme.per == "tensor" else x.abs().amax(-1, keepdim=True)
    return scale_that_holds(largest, scheme)


def scale_that_holds(largest: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """The scale for these largest |x|, in the same shape; 1 where it would be 0 or too small for a normal number.

    That of a NaN is NaN: rounded to integers, nothing else would tell of it.
    """
    scale = largest / scheme.code_max
    return torch.where(scale < SMALLEST, 1.0, scale)


def round_to_grid(x: torch.Tensor, scale: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """`scale` times the nearest grid value of `x / scale`, saturating. x: float32 [..., K]; scale broadcasts."""
    if scheme.kind == "float":
        return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float().mul_(scale)
    return (x / scale).round_().clamp_(-scheme.code_max - 1, scheme.code_max).mul_(scale)


def _in_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] as [..., groups, size], the last group filled up with zeros."""
    missing = -x.shape[-1] % size
    return torch.unflatten(torch.nn.functional.pad(x, (0, missing)), -1, (-1, size))
