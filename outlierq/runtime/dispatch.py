"""The products as torch operators: they choose by device, number of tokens and dtype, and torch.compile sees through.

    outlierq::packed_linear(
        x, words, scale, zero_point, super_scale, bias, codes, group_size, out_features, direct
    ) -> y
    outlierq::int8_linear(x, codes, scale, input_scale, columns, outlier_weight, bias, per_token, direct) -> y

`packed_linear` rounds no input. codes: a name of `ops.compiled.products.CODES`.
The layout of its weight is that of the device: on CUDA `kernels.layout`; on the CPU
the panels of `ops.compiled.products` (zero_point: offsets), else that of `runtime.layout` for 4 bits (scale: pairs,
zero_point is None), plain int8 rows for 8. `int8_linear` multiplies int8 with int8; its codes are plain rows, or panels
on the CPU. direct: by how many tokens the CPU does not decode, see `cpu`. What oneDNN packed is opaque to operators:
for it, call `int8_on_cpu`, which is torch operators only. Registered with `Library.define` and not as `custom_op`,
whose wrapper costs as much as a small product.
"""

from __future__ import annotations

from typing import Any

import torch

from outlierq.kernels import launch
from outlierq.kernels.layout import DTYPES, KernelError, PackedWeight
from outlierq.ops.compiled.products import CODES, Packed
from outlierq.ops.twins.quant_rows import SplitOperands
from outlierq.runtime import cpu

_library = torch.library.Library("outlierq", "DEF")
_library.define(
    "packed_linear(Tensor x, Tensor words, Tensor scale, Tensor? zero_point, Tensor? super_scale, Tensor? bias, "
    "str codes, int? group_size, int out_features, int direct) -> Tensor"
)
_library.define(
    "int8_linear(Tensor x, Tensor codes, Tensor scale, Tensor? input_scale, Tensor? columns, Tensor? outlier_weight, "
    "Tensor? bias, bool per_token, int direct) -> Tensor"
)

FEW_TOKENS = 8  # rows of the CUDA kernel that is made for decoding
SOME_TOKENS = 128  # up to here the CUDA kernel that decodes in registers; above, decode once and multiply


def _packed_on_cpu(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    super_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    codes: str,
    group_size: int | None,
    out_features: int,
    direct: int,
) -> torch.Tensor:
    """A packed weight with our compiled product or torch's."""
    in_panels, code = words.ndim == 3, CODES[codes]
    steps, columns = (code.words, code.columns) if in_panels else (1, 2 if codes == "int4" else 1)
    _check_input(x, words.shape[1] // steps * columns, words=words, scale=scale)
    if not in_panels and x.dtype != torch.bfloat16:
        raise KernelError(f"packed weights on the CPU take bfloat16 inputs; got {_named(x=x)}")
    if in_panels and x.dtype not in (*DTYPES, torch.float32):
        raise KernelError(f"packed weights take float32 or 16-bit inputs; got {_named(x=x)}")
    flat = x.reshape(-1, x.shape[-1])
    weight = Packed(words, scale, zero_point, codes, super_scale)
    y = cpu.packed_linear(flat, weight, out_features, cpu.is_direct(direct, flat.shape[0]))
    return _finished(y, x, bias)


def _packed_on_cuda(
    x: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    super_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    codes: str,
    group_size: int | None,
    out_features: int,
    direct: int = cpu.ALWAYS,
) -> torch.Tensor:
    """A packed weight with our kernels; `super_scale` is what they have as a factor."""
    shape = (CODES[codes].bits, group_size, out_features, x.shape[-1])
    kind = "float" if CODES[codes].exponent else "outlier-victim" if CODES[codes].paired else "int"
    weight = PackedWeight(words, scale, zero_point, *shape, kind, super_scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] <= FEW_TOKENS:
        y = launch.w4a16_gemv(flat, weight, bias)
    elif flat.shape[0] <= SOME_TOKENS:
        y = launch.w4a16_gemm(flat, weight, bias)
    else:
        y = torch.nn.functional.linear(flat, launch.dequant(weight), bias)
    return y.view(*x.shape[:-1], out_features)


def int8_on_cpu(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    columns: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    per_token: bool,
    direct: int = cpu.ALWAYS,
    opaque: bool = False,
) -> torch.Tensor:
    """int8 times int8: x [..., in] times codes [out, in] is [..., out]."""
    in_features = codes.shape[0] if opaque else 4 * (codes.shape[1] - 1) if codes.ndim == 3 else codes.shape[1]
    _check_input(x, in_features, codes=codes, scale=scale)
    flat = x.reshape(-1, x.shape[-1])
    how = (per_token, opaque, cpu.is_direct(direct, flat.shape[0]))
    y = cpu.int8_linear(flat, codes, scale, input_scale, columns, outlier_weight, *how)
    return _finished(y, x, bias)


def _int8_on_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    columns: torch.Tensor | None,
    outlier_weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    per_token: bool,
    direct: int = cpu.ALWAYS,
) -> torch.Tensor:
    """int8 times int8 with our kernels; plain torch for a dtype or width that they do not know."""
    _check_input(x, codes.shape[1], codes=codes, scale=scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if x.dtype not in DTYPES or codes.shape[0] % 8 or codes.shape[1] % 16:
        return _finished(cpu.int8_linear(flat, codes, scale, input_scale, columns, outlier_weight, per_token), x, bias)
    if per_token and input_scale is None:
        pitch = None if outlier_weight is None else outlier_weight.shape[1]
        low, step, outliers = launch.quant_rows(flat, columns, pitch)
    else:
        (low, step), outliers = cpu.quantize_input(flat, input_scale, per_token), None
    outliers = None if columns is None else outliers
    given = SplitOperands(low, step.view(-1), codes, scale, outliers, outlier_weight, bias)
    y = launch.w8a8_outlier(given, dtype=x.dtype)
    return y.view(*x.shape[:-1], codes.shape[0])


def _packed_shape(x: torch.Tensor, *weight: Any) -> torch.Tensor:
    """For torch.compile: what comes out, without values."""
    return x.new_empty(*x.shape[:-1], weight[-2])  # out_features


def _int8_shape(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _finished(y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """With bias, in the shape that belongs to `x`."""
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], y.shape[-1])


def _check_input(x: torch.Tensor, columns: int, **weight: torch.Tensor) -> None:
    """Refuse an input that does not fit, before anything runs."""
    if x.ndim == 0 or x.shape[-1] != columns or not x.is_floating_point():
        raise KernelError(f"x must be floating-point [..., {columns}]; got {_named(x=x, **weight)}")
    strangers = {name: str(t.device) for name, t in weight.items() if t.device != x.device}
    if strangers:
        raise KernelError(f"x is on {x.device}, but {strangers}; got {_named(x=x, **weight)}")


def _named(**tensors: torch.Tensor) -> str:
    """Name, dtype and shape of each."""
    return ", ".join(f"{n} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for n, t in tensors.items())


_library.impl("packed_linear", _packed_on_cpu, "CPU")
_library.impl("packed_linear", _packed_on_cuda, "CUDA")
_library.impl("int8_linear", int8_on_cpu, "CPU")
_library.impl("int8_linear", _int8_on_cuda, "CUDA")
torch.library.register_fake("outlierq::packed_linear", _packed_shape)
torch.library.register_fake("outlierq::int8_linear", _int8_shape)
