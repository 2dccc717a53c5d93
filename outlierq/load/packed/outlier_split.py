"""Reads `outlierq-split` checkpoints, and runs what they and LLM.int8() checkpoints mean: int8 inputs, 16-bit columns.

The decoder is numpy alone and shares nothing with the exporter, whose work it verifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import SourceError
from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Numbers, Parts, as_floats
from outlierq.load.packed.codes.word_packed import members_of
from outlierq.load.packed.decoded import DecodedCheckpoint, checked_scales
from outlierq.load.packed.described import nothing_packed
from outlierq.load.packed.reading import presents, reads_rows
from outlierq.ops.twins.int8_split import PER_TOKEN, dynamic_split_matmul, split_matmul

if TYPE_CHECKING:
    import numpy as np

    from outlierq.core.model import Checkpoint

COLUMNS = ".outlier_columns"


def decode_split(
    weight: Numbers, weight_scale: Numbers, outlier_columns: Numbers, outlier_weight: Numbers
) -> np.ndarray:
    """Float32 [out, in]: codes * scale, and the outlier columns as they are kept.

    weight: [out, in] int8. weight_scale: [out, 1]. outlier_columns: [k]. outlier_weight: [out, k]. SourceError when the
    columns do not fit.
    """
    import numpy as np

    codes, columns = np.asarray(weight), np.asarray(outlier_columns).astype(np.int64)
    rows, width = codes.shape
    if columns.size and (columns.min() < 0 or columns.max() >= width or np.any(np.diff(columns) <= 0)):
        raise SourceError(f"the outlier columns are not ascending numbers from 0 to {width - 1}")
    outliers = as_floats(outlier_weight)
    if outliers.shape != (rows, columns.size):
        raise SourceError(f"{columns.size} outlier columns of {rows} rows need weights {rows} x {columns.size}")
    scale = as_floats(weight_scale)
    if scale.size != rows:
        raise SourceError(f"{scale.size} scales do not fit {rows} rows of codes")
    dense = codes.astype(np.float32) * scale.reshape(rows, 1)
    dense[:, columns] = outliers
    return dense


@reads_rows("outlierq-split", "weight", "weight_scale", "outlier_columns", "outlier_weight")
def split_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """Output rows [start, stop), float32 [stop - start, in]. SourceError when the tensors do not fit."""
    by_row = {name: stored[name][start:stop] for name in ("weight", "weight_scale", "outlier_weight")}
    return torch.from_numpy(decode_split(outlier_columns=stored["outlier_columns"], **by_row))


class SplitCheckpoint(DecodedCheckpoint):
    """An int8 checkpoint. Subclasses say how a linear decodes and what module computes it."""

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""
        return torch.from_numpy(self.decode(self.parts(name)))

    def decode(self, parts: Parts) -> np.ndarray:
        """Float32 [out, in]."""
        return decode_split(**parts)

    def check_shapes(self, name: str) -> None:
        """SourceError when scales or outlier columns do not belong to the codes, by their headers."""
        shapes = {role: self.original.tensors[member].shape for role, member in self.linears[name].members.items()}
        rows, scales = self.linears[name].shape[0], shapes.get("weight_scale", shapes.get("SCB", ()))
        outliers = shapes.get("outlier_weight", (rows, 0)), (rows, *shapes.get("outlier_columns", (0,)))
        if prod(scales) != rows or outliers[0] != outliers[1]:
            raise SourceError(
                f"{name} of {self.source} has {rows} rows of codes, scales {list(scales)}, and outlier weights "
                f"{list(outliers[0])} where {list(outliers[1])} belong"
            )

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no finite number, or 0 over codes that are not."""
        role = next(role for role in ("weight_scale", "SCB") if role in self.linears[name].members)
        parts = self.parts(name, (role, "outlier_weight"))
        if "outlier_columns" in parts:
            parts["outlier_weight"] = torch.zeros(len(parts["weight"]), len(parts["outlier_columns"]))
        scale = self.original.read(self.linears[name].members[role])
        checked_scales(name, scale, lambda empty: self.decode({**parts, role: empty}), signed=role != "SCB")

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in], scales [out, 1] and outlier columns [k] of a linear, by the name of its weight."""
        parts = self.parts(name)
        scale, columns, outlier_weight = parts["weight_scale"], parts["outlier_columns"].long(), parts["outlier_weight"]
        rows = len(parts["weight"])
        if scale.numel() != rows or outlier_weight.shape != (rows, len(columns)):
            raise SourceError(
                f"{name} of {self.source} has {rows} rows of codes, {scale.numel()} scales, and outlier weights "
                f"{list(outlier_weight.shape)} for {len(columns)} columns"
            )
        scheme = QuantScheme(8, None, scale_dtype=str(scale.dtype).removeprefix("torch."), activations=PER_TOKEN)
        return QuantTensor(parts["weight"], scale, None, scheme, outlier_columns=columns, outlier_weight=outlier_weight)

    def layer(self, parts: Parts, bias: torch.Tensor | None) -> torch.nn.Module:
        """The module that computes the linear as stored: int8 codes [out, in], 16-bit columns [out, k]; bias: [out]."""
        columns, outlier_weight = parts["outlier_columns"].long(), parts["outlier_weight"]
        return StaticSplitLinear(parts["weight"], parts["weight_scale"], bias, columns, outlier_weight)

    def install(self, model: torch.nn.Module, names: Mapping[str, str]) -> None:
        """Put modules that compute in int8 into a model that has the decoded weights. names: parameter -> tensor."""
        for slot, tensor in names.items():
            if tensor in self.linears:
                name = slot.removesuffix(".weight")
                plain = model.get_submodule(name)
                model.set_submodule(name, self.layer(self.parts(tensor), plain.bias).to(plain.weight.device))


class SplitLinear(torch.nn.Module):
    """A linear layer on int8 inputs and weights. weight: [out, in] int8, scale: [out, 1]; the output has x's dtype."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The layer without its bias, [..., in] -> [..., out]."""
        raise NotImplementedError


class StaticSplitLinear(SplitLinear):
    """With fixed outlier columns. columns: [k], outlier_weight: [out, k]."""

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        columns: torch.Tensor,
        outlier_weight: torch.Tensor,
    ):
        super().__init__(weight, scale, bias)
        self.register_buffer("columns", columns)
        self.register_buffer("outlier_weight", outlier_weight)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], by `ops.twins.int8_split.split_matmul`."""
        return split_matmul(x, self.weight, self.scale, self.columns, self.outlier_weight)


class DynamicSplitLinear(SplitLinear):
    """LLM.int8() as bitsandbytes computes it: outlier columns are found in each call."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float):
        super().__init__(weight, scale, bias)
        self.threshold = threshold

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], by `ops.twins.int8_split.dynamic_split_matmul` without the original weight."""
        return dynamic_split_matmul(x, self.weight, self.scale, threshold=self.threshold)


@presents("outlierq")
def split_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> SplitCheckpoint:
    """The presentation of an `outlierq-split` folder. config: its quantization_config."""
    if config.get("format") != "outlierq-split":
        raise SourceError(f"{stored.source} has the format {config.get('format')!r}, which is not known here")
    stems = [name.removesuffix(COLUMNS) for name in stored.tensors if name.endswith(COLUMNS)]
    roles = ("weight", "weight_scale", "outlier_columns", "outlier_weight")
    return SplitCheckpoint(stored, linears_of(stored, stems, roles))


def linears_of(stored: Checkpoint, stems: list[str], roles: tuple[str, ...]) -> dict[str, StoredLinear]:
    """The stored linears by the name of their weight; SourceError when one lacks a tensor or there is none."""
    if not stems:
        raise nothing_packed(stored)
    linears = {}
    for stem in stems:
        members = members_of(stored, stem, roles)
        weight = stored.tensors[members["weight"]]
        if weight.dtype != "I8" or len(weight.shape) != 2:
            raise SourceError(f"{weight.name} is {weight.dtype} {list(weight.shape)}, not a matrix of int8 codes")
        linears[weight.name] = StoredLinear(weight.shape, members)
    return linears
