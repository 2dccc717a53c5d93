"""How numbers are stored. A scheme says what a format must express; it holds no numbers itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FP8_MAX = 448.0  # largest finite E4M3 value
FP4_MAX = 6.0  # largest E2M1 value
FLOAT_MAX = {4: FP4_MAX, 8: FP8_MAX}


@dataclass(frozen=True)
class ActivationScheme:
    """8-bit (int: also 4-bit) symmetric numbers for the input of a linear.

    kind: "int" (-128..127, or -127..127 where rounding keeps it there) or "float" (E4M3, saturating at 448).
    dynamic: scales are computed at run time from the values themselves; otherwise one scale is fixed from calibration.
    per: "token" (one scale per row), "tensor" (one scale), or "group" (one scale per row and 128 columns; the
    companion of 128 x 128 weight blocks).
    """

    kind: Literal["int", "float"] = "int"
    bits: int = 8
    dynamic: bool = True
    per: Literal["token", "tensor", "group"] = "token"
    group_size: int = 128

    @property
    def code_max(self) -> float:
        """The magnitude that the largest value of a scale's range is mapped to."""
        return FP8_MAX if self.kind == "float" else (1 << (self.bits - 1)) - 1

    def __str__(self) -> str:
        name = "fp8" if self.kind == "float" else f"int{self.bits}"
        return f"{name} per {self.per} {'dynamic' if self.dynamic else 'static'}"


@dataclass(frozen=True)
class CacheScheme:
    """The KV cache in E4M3 with calibrated scales: one per tensor, or one per key-value head."""

    per: Literal["tensor", "head"] = "tensor"
    bits: int = 8


@dataclass(frozen=True)
class QuantScheme:
    """Weights of 2 to 8 bits with one scale per (output row, group of input columns), or per two-dimensional block.

    bits: 2..8. group_size: input columns that share a scale; None means the whole row (per channel).
    symmetric: no zero point; codes lie in [-2^(bits-1), 2^(bits-1) - 1].
    scale_dtype: name of the torch dtype in which scales are stored ("bfloat16", "float16", "float32").
    Every method rounds its scales to this dtype before it derives codes.
    kind: "int", or "float" (E4M3 values of 8 bits or E2M1 values of 4, symmetric). block: (rows, columns) that share a
    scale instead of group_size, ragged at the edges. activations: how the input is quantized at run time, None for 16
    bits. scales: "plain" numbers in scale_dtype; "power-of-two" (E8M0, as in MXFP4); or "two-level", small numbers that
    count in units of a larger one: E4M3 in units of one float32 of the whole weight (NVFP4), or, asymmetric, 6-bit
    scales and minima in units of two float16 of every 8 groups (Q4_K of GGUF).
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    kind: Literal["int", "float"] = "int"
    block: tuple[int, int] | None = None
    activations: ActivationScheme | None = None
    scales: Literal["plain", "two-level", "power-of-two"] = "plain"

    @property
    def code_min(self) -> float:
        """Smallest code: signed for symmetric grids, 0 for asymmetric ones."""
        if self.kind == "float":
            return -FLOAT_MAX[self.bits]
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def code_max(self) -> float:
        """Largest code."""
        if self.kind == "float":
            return FLOAT_MAX[self.bits]
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` columns; the width must be divisible, but not by blocks."""
        if self.block is not None:
            return -(-in_features // self.block[1])
        return 1 if self.group_size is None else in_features // self.group_size

    def columns_per_group(self, in_features: int) -> int:
        """Width of one group: `group_size`, that of a block, or the whole row when scales are per channel."""
        if self.block is not None:
            return self.block[1]
        return in_features if self.group_size is None else self.group_size

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a weight [rows, columns]."""
        return rows if self.block is None else -(-rows // self.block[0]), self.groups(columns)

    @property
    def numbers(self) -> str:
        """What the codes are: int4, fp8, nvfp4, mxfp4."""
        if self.kind == "int":
            return f"int{self.bits}"
        return {"two-level": "nvfp4", "power-of-two": "mxfp4"}.get(self.scales, f"fp{self.bits}")

    def __str__(self) -> str:
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        if self.block is not None:
            group = f"blocks {self.block[0]}x{self.block[1]}"
        name = self.numbers
        if self.kind == "int":
            name += " symmetric" if self.symmetric else " asymmetric"
            group += "" if self.scales == "plain" else f", {self.scales} scales"
        inputs = f", inputs {self.activations}" if self.activations else ""
        return f"{name} {group}{inputs}"
