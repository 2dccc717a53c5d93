"""How numbers are stored. A scheme says what a format must express; it holds no numbers itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlierq.core.gguf.types import BlockType, block_types

FP8_MAX = 448.0  # largest finite E4M3 value
FP6_MAX = 7.5  # largest E2M3 value
FP4_MAX = 6.0  # largest E2M1 value
FLOAT_MAX = {4: FP4_MAX, 6: FP6_MAX, 8: FP8_MAX}
PAIR_MAX = 96  # largest outlier of outlier-victim pairs
SIGNS = 8  # weights of a codebook's vectors whose signs are stored together


@dataclass(frozen=True)
class ActivationScheme:
    """Symmetric numbers of 8 or 4 bits for the input of a linear.

    kind: "int" (-128..127, or -127..127 where rounding keeps it there) or "float" (E4M3 of 8 bits, saturating at 448;
    E2M1 of 4, saturating at 6).
    dynamic: scales are computed at run time from the values themselves; otherwise one scale is fixed from calibration.
    per: "token" (one scale per row), "tensor" (one scale), or "group" (one scale per row and group_size columns: 128
    beside 128 x 128 weight blocks, 32 in MX formats, 16 in NVFP4).
    scales: of groups. "plain" numbers; "power-of-two" (MXFP4, MXFP8); or "two-level" (NVFP4): E4M3 numbers computed at
    run time, divided by one float32 that is fixed from calibration, so that such a scheme is not dynamic.
    """

    kind: Literal["int", "float"] = "int"
    bits: int = 8
    dynamic: bool = True
    per: Literal["token", "tensor", "group"] = "token"
    group_size: int = 128
    scales: Literal["plain", "two-level", "power-of-two"] = "plain"

    @property
    def code_max(self) -> float:
        """The magnitude that the largest value of a scale's range is mapped to."""
        return FLOAT_MAX[self.bits] if self.kind == "float" else (1 << (self.bits - 1)) - 1

    @property
    def numbers(self) -> str:
        """What the codes are: int8, int4, fp8, nvfp4, mxfp4, mxfp8."""
        if self.kind == "int":
            return f"int{self.bits}"
        return {"two-level": "nvfp4", "power-of-two": f"mxfp{self.bits}"}.get(self.scales, f"fp{self.bits}")

    def __str__(self) -> str:
        name = self.numbers
        if self.scales != "plain":
            return name
        return f"{name} per {self.per} {'dynamic' if self.dynamic else 'static'}"


@dataclass(frozen=True)
class CacheScheme:
    """How a server keeps keys and values. numbers: "fp8" is E4M3 with calibrated scales, one per tensor or one per
    key-value head. Of the others a server makes a scale for each token and head itself; nothing is stored.
    """

    per: Literal["tensor", "head"] = "tensor"
    numbers: Literal["fp8", "int8", "int4", "nvfp4"] = "fp8"

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 if self.numbers.endswith("8") else 4

    @property
    def is_stored(self) -> bool:
        """Whether a checkpoint says anything of it."""
        return self.numbers == "fp8"


@dataclass(frozen=True)
class QuantScheme:
    """Weights of 2 to 8 bits with one scale per (output row, group of input columns), or per two-dimensional block.

    bits: 2..8. group_size: input columns that share a scale; None means the whole row (per channel).
    symmetric: no zero point; codes lie in [-2^(bits-1), 2^(bits-1) - 1].
    scale_dtype: name of the torch dtype in which scales are stored ("bfloat16", "float16", "float32").
    Every method rounds its scales to this dtype before it derives codes.
    kind: "int", "float" (E4M3 values of 8 bits, E2M3 of 6 or E2M1 of 4, symmetric), "codebook" (values of a table,
    which `type` names, symmetric), or "outlier-victim" (OliVe: 4 bits, codes from -7 to 7, but in some pairs of columns
    one of 12 to 96 of either sign beside a 0). block: (rows, columns) that share a scale instead of group_size, ragged
    at edges. activations: how the input is quantized at run time, None for 16 bits. scales: "plain" numbers in
    scale_dtype; "minimum", such a scale and a real minimum (Q4_1 of GGUF); "power-of-two" (E8M0, as in MXFP4, MXFP6 and
    MXFP8); or "two-level", small numbers that count in units of a larger one: E4M3 in units of one float32 of the whole
    weight (NVFP4), or integers in units of one or two float16 of some groups (Q4_K of GGUF). type: the name of a type
    of GGUF, which then decides everything else; None where the other fields do.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    kind: Literal["int", "float", "codebook", "outlier-victim"] = "int"
    block: tuple[int, int] | None = None
    activations: ActivationScheme | None = None
    scales: Literal["plain", "minimum", "two-level", "power-of-two"] = "plain"
    type: str | None = None

    @property
    def blocks(self) -> BlockType:
        """The type of GGUF that stores it: of two-level integers, also without a name, Q4_K."""
        return block_types()[self.type or "Q4_K"]

    @property
    def has_units(self) -> bool:
        """Whether scales are small integers in units of some groups of a row."""
        return self.scales == "two-level" and self.kind != "float"

    @property
    def has_real_minima(self) -> bool:
        """Whether zero points are no integers."""
        return not self.symmetric and self.scales in ("minimum", "two-level")

    @property
    def vector(self) -> int:
        """Weights that are rounded together, because one code stands for them, or one takes the code of the other."""
        if self.kind == "outlier-victim":
            return 2
        return 1 if self.type is None else self.blocks.vector

    @property
    def together(self) -> int:
        """Neighbouring columns that are rounded at once: a pair, or the vectors of a codebook that share signs."""
        return SIGNS if self.kind == "codebook" and self.vector > 1 else self.vector

    @property
    def code_min(self) -> float:
        """Smallest code: signed for symmetric grids, 0 for asymmetric ones."""
        if self.kind == "float":
            return -FLOAT_MAX[self.bits]
        if self.kind == "codebook":
            return self.blocks.codes[0]
        if self.kind == "outlier-victim":
            return -PAIR_MAX
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def code_max(self) -> float:
        """Largest code."""
        if self.kind == "float":
            return FLOAT_MAX[self.bits]
        if self.kind == "codebook":
            return self.blocks.codes[1]
        if self.kind == "outlier-victim":
            return PAIR_MAX
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
        """What the codes are: int4, fp8, nvfp4, mxfp4, mxfp6, mxfp8, outlier-victim, or the name of a type of GGUF."""
        if self.type is not None:
            return self.type
        if self.kind == "outlier-victim":
            return self.kind
        if self.kind == "int":
            return f"int{self.bits}"
        return {"two-level": "nvfp4", "power-of-two": f"mxfp{self.bits}"}.get(self.scales, f"fp{self.bits}")

    def __str__(self) -> str:
        if self.type is not None:
            return f"{self.type} ({self.blocks.bits_per_weight:g} bits)"
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        if self.block is not None:
            group = f"blocks {self.block[0]}x{self.block[1]}"
        name = self.numbers
        if self.kind == "int":
            name += " symmetric" if self.symmetric else " asymmetric"
            group += "" if self.scales == "plain" else f", {self.scales} scales"
        inputs = f", inputs {self.activations}" if self.activations else ""
        return f"{name} {group}{inputs}"


def gguf_scheme(name: str) -> QuantScheme:
    """The scheme of a type of GGUF, by its name."""
    return QuantScheme(**block_types()[name].settings, scale_dtype="float16", type=name)
