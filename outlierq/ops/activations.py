"""Quantized activations: what a linear's input becomes at run time, in plain torch; every backend follows it."""

from __future__ import annotations

import torch

from outlierq.core.scheme import FP8_MAX, ActivationScheme
from outlierq.ops.grid import nearest_e2m1

SMALLEST = torch.finfo(torch.float32).tiny
# What compressed-tensors and vLLM take for an E4M3 scale that is rounded to 0: every code under it is 0, too.
INSTEAD_OF_ZERO = 0.125
# The power of two in the largest number of E2M1 and of E4M3: 6 = 1.5 x 2^2, 448 = 1.75 x 2^8.
EXPONENT = {4: 2, 8: 8}


def fake_quantize(x: torch.Tensor, scheme: ActivationScheme, scale: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] rounded to the scheme's grid and back, in the dtype of `x`.

    scale: [1] of a static scheme; a dynamic one takes max|x| / code_max over its token, group of columns or tensor
    (1 where that is no normal number, as where all values are 0). Scales of groups: see `group_scale`. Gradients pass
    the rounding as if it were not there (straight-through): its own are 0.
    """
    if x.requires_grad:
        return fake_quantize(x.detach(), scheme, scale) + (x - x.detach())
    wide = x.float()
    if scheme.per == "group":
        grouped = _in_groups(wide, scheme.group_size)
        rounded = round_to_grid(grouped, group_scale(grouped, scheme, scale), scheme).flatten(-2)
        return rounded[..., : x.shape[-1]].to(x.dtype)
    if scale is None:
        scale = dynamic_scale(wide, scheme)
    return round_to_grid(wide, scale.float(), scheme).to(x.dtype)


def rounded_by_its_scale(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """`fake_quantize(x)` of x [..., K] with dynamic scales, and gradients that know where the scale comes from.

    x = s u is rounded to s q(u). Through q(u) gradients pass as if it were u; through s they reach the value that the
    scale holds, in whose hands the errors of all others are. Straight-through alone would not see that. Scales that
    are powers of two, or are rounded themselves, have no gradient.
    """
    if scheme.per == "group":
        grouped = _in_groups(x, scheme.group_size)
        scale = dynamic_scale(grouped, scheme) if scheme.scales == "plain" else group_scale(grouped.detach(), scheme)
        return _on_grid(grouped, scale, scheme).flatten(-2)[..., : x.shape[-1]]
    return _on_grid(x, dynamic_scale(x, scheme), scheme)


def _on_grid(x: torch.Tensor, scale: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """scale q(x / scale), q without a gradient of its own. x: float32 [..., K]; scale broadcasts."""
    unit, fixed = x / scale, scale.detach()
    rounded = round_to_grid(x.detach(), fixed, scheme) / fixed
    return scale * (unit + (rounded - unit.detach()))


def dynamic_scale(x: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """Scale that just holds the largest value of x [..., K]: [..., 1] per token or group, [] for the whole tensor."""
    largest = x.abs().amax() if scheme.per == "tensor" else x.abs().amax(-1, keepdim=True)
    return scale_that_holds(largest, scheme)


def group_scale(x: torch.Tensor, scheme: ActivationScheme, unit: torch.Tensor | None = None) -> torch.Tensor:
    """Scale of each group of x [..., groups, columns], [..., groups, 1], as vLLM and compressed-tensors compute it.

    unit: [1] of two-level scales, by which E4M3 numbers are divided; left out, it is that of the largest of x.
    """
    if scheme.scales == "power-of-two":
        return mx_scale(x.abs().amax(-1, keepdim=True), scheme.bits)
    if scheme.scales == "plain":
        return dynamic_scale(x, scheme)
    largest = x.abs().amax(-1, keepdim=True)
    unit = unit_that_holds(largest.amax(), scheme) if unit is None else unit.float()
    exact = largest / scheme.code_max * unit
    whole = exact.clamp_(max=FP8_MAX).to(torch.float8_e4m3fn).float()
    return torch.where(whole == 0, INSTEAD_OF_ZERO, whole) / unit


def unit_that_holds(largest: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """[1] float32: the unit under which a group with this largest |x| has the largest E4M3 scale."""
    return torch.where(largest > 0, scheme.code_max * FP8_MAX / largest, torch.ones_like(largest)).reshape(1)


def mx_scale(largest: torch.Tensor, bits: int) -> torch.Tensor:
    """The power of two of an MX block with this largest |x|, of any shape. bits: 4 of E2M1, 8 of E4M3.

    OCP Microscaling specification 1.0, section 6.3, with the exponent of `largest` rounded up from 1.75 x 2^e: what
    lies above would be rounded to 8 in E2M1, and is more than 448 in E4M3. 1 where all values are 0.
    """
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa x 2^exponent, 0.5 <= mantissa < 1
    power = (exponent - 1 + (mantissa >= 0.875).int() - EXPONENT[bits]).clamp_(-127, 127)
    scale = torch.ldexp(torch.ones_like(largest), power)
    return torch.where(largest == 0, 1.0, torch.where(largest.isfinite(), scale, torch.nan))


def scale_that_holds(largest: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """The scale for these largest |x|, in the same shape; 1 where it would be 0 or too small for a normal number.

    That of a NaN is NaN: rounded to integers, nothing else would tell of it.
    """
    scale = largest / scheme.code_max
    return torch.where(scale < SMALLEST, 1.0, scale)


def round_to_grid(x: torch.Tensor, scale: torch.Tensor, scheme: ActivationScheme) -> torch.Tensor:
    """`scale` times the nearest grid value of `x / scale`, saturating. x: float32 [..., K]; scale broadcasts."""
    if scheme.kind == "float" and scheme.bits == 4:
        return nearest_e2m1(x / scale).mul_(scale)
    if scheme.kind == "float":
        return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float().mul_(scale)
    return (x / scale).round_().clamp_(-scheme.code_max - 1, scheme.code_max).mul_(scale)


def _in_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., K] as [..., groups, size], the last group filled up with zeros."""
    missing = -x.shape[-1] % size
    return torch.unflatten(torch.nn.functional.pad(x, (0, missing)), -1, (-1, size))
