"""`QuantLinear`: a linear layer that keeps its weight packed, whatever format the checkpoint has.

Three forms. "int8": int8 inputs meet int8 weights, summed in int32. "packed": integers or floats of 4 to 8 bits in the
layout of the device's product, float inputs (rounded first where the checkpoint says so). "decoded": everything else
keeps its codes and decodes them block by block in every call; `reason` says why. The weight is repacked once, when the
layer is made; on the CPU in the way that is the fastest for its shape.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F

from outlierq.core.quant_tensor import QuantTensor
from outlierq.kernels import layout as kernel_layout
from outlierq.kernels.layout import KernelError
from outlierq.kernels.plan import check_columns
from outlierq.ops.activations import fake_quantize
from outlierq.ops.compiled import products
from outlierq.runtime import cpu, dispatch, layout, pages, ways  # dispatch registers the operators
from outlierq.runtime.choice import Choice, choose
from outlierq.runtime.ways import Parts

BLOCK_ROWS = 256  # decoded at a time; such a block of float32 stays in the cache


class QuantLinear(torch.nn.Module):
    """`x` [..., in] times a quantized weight, [..., out]; the result has the dtype of `x`.

    form: "int8", "packed" or "decoded". reason: why it is decoded, else None. choice: the way on the CPU, if it is not
    to be the fastest. A layer is made for one dtype of inputs and one device and stays there.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    columns: torch.Tensor | None
    outlier_weight: torch.Tensor | None
    super_scale: torch.Tensor | None
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: QuantTensor,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        choice: Choice | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.inputs, self.scheme = weight.scheme.activations, weight.scheme
        self.form, self.reason = _form(weight, dtype, torch.device(device))
        self.codes, self.dtype = ways.kind_of_codes(weight), dtype
        self.group_size: int | None = None
        self.choice: Choice | None = None
        if self.form != "decoded" and torch.device(device).type == "cpu":
            self.choice = choice or choose(weight, dtype, self.form == "int8")
        self.direct = cpu.ALWAYS if self.choice is None else self.choice.direct
        held = {"int8": self._hold_int8, "packed": self._hold_packed, "decoded": self._hold_decoded}[self.form]
        parts = held(weight, dtype, torch.device(device))
        parts.setdefault("super_scale", None)
        parts["input_scale"] = None if weight.input_scale is None else weight.input_scale.float()
        parts["bias"] = None if bias is None else bias.to(dtype)
        for name, value in parts.items():
            self.register_buffer(name, None if value is None else value.to(device))
        self.opaque = self.words.is_mkldnn  # packed by oneDNN
        if self.form != "decoded":
            pages.gather(self.words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias."""
        if self.form == "int8":
            per_token = self.inputs is not None and self.inputs.per == "token"
            split = (self.columns, self.outlier_weight)
            parts = (self.words, self.scale, self.input_scale, *split, self.bias, per_token)
            if self.opaque:
                return dispatch.int8_on_cpu(x, *parts, opaque=True)
            y: torch.Tensor = torch.ops.outlierq.int8_linear(x, *parts, self.direct)
            return y
        if self.inputs is not None:
            x = fake_quantize(x, self.inputs, self.input_scale)
        if self.form == "packed":
            weight = (self.words, self.scale, self.zero_point, self.super_scale)
            how = (self.bias, self.codes, self.group_size, self.out_features, self.direct)
            product: torch.Tensor = torch.ops.outlierq.packed_linear(x, *weight, *how)
            return product
        return self._decoded(x)

    def dense(self) -> torch.Tensor:
        """The weight that this layer multiplies with, float32 [out, in]."""
        if self.form == "decoded":
            return self._stored().dequantize()
        if self.words.ndim == 3 and self.words.device.type == "cpu":
            return self._from_panels()
        if self.form == "packed" and self.words.device.type == "cpu" and self.codes == "int4":
            pairs = self.scale.float().transpose(0, 1)  # [out, groups, 2]
            codes = layout.unpack_int4(self.words).float().view(pairs.shape[0], pairs.shape[1], -1)
            dense = codes.mul_(pairs[..., :1]).add_(pairs[..., 1:])
            return dense.view(dense.shape[0], -1)[: self.out_features]
        if self.form == "packed" and self.words.device.type != "cpu":
            scheme = (products.CODES[self.codes].bits, self.group_size, self.out_features, self.in_features)
            kind = (self.scheme.kind, self.super_scale)
            return _from_kernels(kernel_layout.PackedWeight(self.words, self.scale, self.zero_point, *scheme, *kind))
        return self._with_outliers(layout.unpack_int8(self.words).float() * self.scale.float()[:, None])

    def _with_outliers(self, dense: torch.Tensor) -> torch.Tensor:
        """A dense weight with the columns in 16 bits, in place."""
        if self.columns is not None:
            assert self.outlier_weight is not None, "outlier columns need their weight"
            dense[:, self.columns.long()] = self.outlier_weight[:, : self.columns.numel()].float()
        return dense

    def _from_panels(self) -> torch.Tensor:
        """Float32 [out, in] of a weight in panels, to the bit: offsets are whole multiples of the scales."""
        if self.form == "int8":
            codes = products.unpack_panels(self.words[:, :-1], "int8")[: self.out_features].float()
            return self._with_outliers(codes * self.scale[:, None])
        codes = products.unpack_panels(self.words, self.codes)[: self.out_features]
        scale = _by_row(self.scale)[: self.out_features]
        if self.scheme.kind == "float":
            by_row = replace(self.scheme, block=None)
            return QuantTensor(codes, scale, None, by_row, super_scale=self.super_scale).dequantize()
        grouped = codes.float().view(*scale.shape, -1)
        if self.zero_point is not None:
            grouped += (_by_row(self.zero_point)[: self.out_features] / scale).round()[..., None]
        return (grouped * scale[..., None]).view(self.out_features, -1)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}, {self.form}"

    def _hold_int8(self, weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Parts:
        """int8 codes, ordered for the CPU's product or in rows, a scale per row, outlier columns in multiples of 8."""
        columns, outlier_weight = weight.outlier_columns, weight.outlier_weight
        if columns is not None:
            assert outlier_weight is not None, "outlier columns need their weight"
            check_columns(columns, self.in_features)
            outlier_weight = F.pad(outlier_weight.to(dtype), (0, -columns.numel() % 8)).contiguous()
            columns = columns.int()
        split = {"columns": columns, "outlier_weight": outlier_weight}
        if self.choice is not None:
            return self._way().hold(weight) | split
        codes, scale = weight.codes.to(torch.int8).contiguous(), weight.scale.float().flatten()
        return {"words": codes, "scale": scale, "zero_point": None, **split}

    def _way(self) -> ways.Way:
        """The way of this layer on the CPU."""
        return next(way for way in ways.WAYS if self.choice is not None and way.name == self.choice.way)

    def _hold_packed(self, weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Parts:
        """The layout of the device."""
        none: Parts = {"columns": None, "outlier_weight": None}
        if self.choice is not None:
            return none | self._way().hold(weight)
        held = _for_kernels(weight, products.CODES[self.codes].bits, dtype)
        self.group_size = held.group_size
        parts = {"words": held.words, "scale": held.scale, "zero_point": held.zero_point, "super_scale": held.factor}
        return none | parts

    def _hold_decoded(self, weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> Parts:
        """The weight as it came."""
        split = {"columns": weight.outlier_columns, "outlier_weight": weight.outlier_weight}
        stored = {"words": weight.codes, "scale": weight.scale, "zero_point": weight.zero_point}
        return {**stored, "super_scale": weight.super_scale, **split}

    def _stored(self) -> QuantTensor:
        """What a decoded layer holds, as a value."""
        split = (self.input_scale, self.columns, self.outlier_weight)
        return QuantTensor(self.words, self.scale, self.zero_point, self.scheme, *split, self.super_scale)

    def _decoded(self, x: torch.Tensor) -> torch.Tensor:
        """Decode a block of rows, multiply, forget it."""
        if x.shape[-1] != self.in_features:
            raise KernelError(f"x must be [..., {self.in_features}]; got {tuple(x.shape)}")
        height = self.scheme.block[0] if self.scheme.block else 1
        step = -(-BLOCK_ROWS // height) * height
        starts = range(0, self.out_features, step)
        blocks = (self._stored().rows(a, min(a + step, self.out_features)).dequantize().to(x.dtype) for a in starts)
        y = torch.cat([F.linear(x, block) for block in blocks], -1)
        return y if self.bias is None else y + self.bias


def summary(model: torch.nn.Module) -> list[str]:
    """How the model's packed linears compute, one sentence for each form, with the reason where it is the slow one, and
    in brackets the ways that were the fastest on the CPU.
    """
    layers = [part for part in model.modules() if isinstance(part, QuantLinear)]
    counts = Counter(_computes(part) for part in layers)
    ways_of = {how: Counter(_way_of(part) for part in layers if _computes(part) == how) for how in counts}
    return [f"{count} linears {how}{_listed(ways_of[how])}" for how, count in counts.most_common()]


def _computes(layer: QuantLinear) -> str:
    """What a layer does."""
    if layer.form == "decoded":
        return f"are decoded in every call: {layer.reason}"
    if layer.form == "int8":
        return "multiply int8 with int8"
    name = f"{products.CODES[layer.codes].bits}-bit" if layer.scheme.kind == "int" else layer.scheme.numbers
    return f"multiply packed {name} weights"


def _way_of(layer: QuantLinear) -> str:
    """The way of a layer on the CPU and the kernel behind it, or nothing."""
    if layer.choice is None or not layer.choice.way.startswith("compiled"):
        return "" if layer.choice is None else layer.choice.way
    kernel = products.int8_kernel() if layer.form == "int8" else products.float_kernel(layer.dtype)
    return f"{layer.choice.way} for {kernel}"


def _listed(ways_of: Counter[str]) -> str:
    """Ways in brackets, counted where there are several."""
    named = [way if len(ways_of) == 1 else f"{count} {way}" for way, count in ways_of.most_common() if way]
    return f" ({', '.join(named)})" if named else ""


def _form(weight: QuantTensor, dtype: torch.dtype, device: torch.device) -> tuple[str, str | None]:
    """(form, why it is decoded)."""
    scheme, inputs = weight.scheme, weight.scheme.activations
    by_row = scheme.group_size is None and scheme.block is None and weight.zero_point is None
    if scheme.kind == "codebook" or (scheme.kind == "int" and scheme.scales != "plain"):
        return "decoded", f"there is no product for {scheme.numbers} weights"
    if (
        by_row
        and scheme.kind == "int"
        and inputs is not None
        and (inputs.kind, inputs.bits) == ("int", 8)
        and inputs.per != "group"
    ):
        return "int8", None
    if weight.outlier_columns is not None:
        return "decoded", "16-bit columns are only known beside int8 inputs"
    reason = ways.why_none(weight, dtype) if device.type == "cpu" else _not_on_cuda(weight, dtype)
    return ("packed", None) if reason is None else ("decoded", reason)


def _not_on_cuda(weight: QuantTensor, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot take this weight."""
    (rows, columns), group = weight.shape, weight.scheme.group_size
    if weight.scheme.kind == "float" and weight.scheme.bits == 6:
        return "there is no CUDA kernel for 6-bit floats"
    if weight.scheme.block is not None:
        if weight.scheme.kind != "float":
            return "scales are per block"
        group = weight.scheme.block[1]
    if dtype not in kernel_layout.DTYPES:
        return f"the CUDA kernels take 16-bit inputs, not {str(dtype).removeprefix('torch.')}"
    if rows % 8 or columns % 16:
        return f"{rows} x {columns} is no multiple of 8 x 16"
    if group not in kernel_layout.groups_for(weight.scheme.kind) or columns % (group or 1):
        return f"groups of {group} columns are not 32, 64 or 128, or do not divide {columns}"
    return kernel_layout.out_of_reach(weight, dtype) if weight.scheme.kind == "float" else None


def _by_row(part: torch.Tensor) -> torch.Tensor:
    """Numbers [panels, groups, 16] by row: [panels * 16, groups]."""
    return part.transpose(1, 2).reshape(-1, part.shape[1])


def _for_kernels(weight: QuantTensor, bits: int, dtype: torch.dtype) -> kernel_layout.PackedWeight:
    """The weight as the CUDA kernels take it."""
    if weight.scheme.kind == "float":
        return kernel_layout.pack_floats(weight, dtype)
    if weight.scheme.kind == "outlier-victim":
        return kernel_layout.pack_pairs(weight, dtype)
    stored = (weight.codes, weight.scale, weight.zero_point)
    return kernel_layout.pack(*stored, bits=bits, group_size=weight.scheme.group_size, dtype=dtype)


def _from_kernels(held: kernel_layout.PackedWeight) -> torch.Tensor:
    """Float32 [out, in] of a weight in the kernels' layout."""
    codes, scale, zero = kernel_layout.unpack(held)
    grouped = codes.float().view(codes.shape[0], scale.shape[1], -1)
    middle = 0 if zero is None else zero.float()[..., None]
    dense = ((grouped - middle) * scale.float()[..., None]).view(codes.shape)
    return dense if held.factor is None else dense * held.factor
