"""How numbers are stored. A scheme says what a format must express; it holds no numbers itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantScheme:
    """Integer weights of 2 to 8 bits with one scale per (output row, group of input columns).

    bits: 2..8. group_size: input columns that share a scale; None means the whole row (per channel).
    symmetric: no zero point; codes lie in [-2^(bits-1), 2^(bits-1) - 1].
    scale_dtype: name of the torch dtype in which scales are stored ("bfloat16", "float16", "float32").
    Every method rounds its scales to this dtype before it derives codes (methods sheet, section 0.2).
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    scale_dtype: str = "bfloat16"

    @property
    def code_min(self) -> int:
        """Smallest code: signed for symmetric grids, 0 for asymmetric ones."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def code_max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` columns; the width must be divisible."""
        return 1 if self.group_size is None else in_features // self.group_size

    def columns_per_group(self, in_features: int) -> int:
        """Width of one group: `group_size`, or the whole row when scales are per channel."""
        return in_features if self.group_size is None else self.group_size

    def __str__(self) -> str:
        group = "per channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {group}"
