"""Numbers of one byte and of half a byte, and tensors as numpy arrays. With numpy alone; shares no code with a packer.

E4M3 (arXiv:2209.05433, section 3) fills a byte. Two E2M1 numbers (OCP Microscaling Formats specification 1.0, section
5.3.3) share one, four E2M3 numbers (section 5.3.2) three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Union

from outlierq.core.errors import SourceError
from outlierq.core.model import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch

# The tensors of one stored linear, by the last part of their names ("weight_packed", "weight_scale", ...).
Parts = Mapping[str, "torch.Tensor"]
# What has a shape: a tensor, or its header.
Shaped = Union["torch.Tensor", TensorInfo]
# Decoders take both alike.
Numbers = Union["np.ndarray", "torch.Tensor"]


def e4m3_values() -> np.ndarray:
    """Float32 [256], the number that each byte stands for in E4M3 (arXiv:2209.05433, section 3).

    Sign bit, 4 bits of exponent with bias 7, 3 of mantissa: (-1)^s * 2^(e - 7) * (1 + m / 8), subnormal where e is 0,
    no infinities, NaN where all other bits are 1.
    """
    import numpy as np

    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    values = np.where(byte >> 7 == 1, -size, size)
    values[byte & 127 == 127] = np.nan
    return values.astype(np.float32)


def e2m1_values() -> np.ndarray:
    """Float32 [16], the number that each half of a byte stands for in E2M1.

    Sign bit, 2 bits of exponent with bias 1, 1 of mantissa: (-1)^s * 2^(e - 1) * (1 + m / 2), or (-1)^s * m / 2 where e
    is 0.
    """
    import numpy as np

    code = np.arange(16)
    exponent, mantissa = (code >> 1) & 3, code & 1
    size = np.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    return np.where(code >> 3 == 1, -size, size).astype(np.float32)


def e2m3_values() -> np.ndarray:
    """Float32 [64], the number of each 6-bit code of E2M3.

    Sign bit, 2 bits of exponent with bias 1, 3 of mantissa: (-1)^s * 2^(e - 1) * (1 + m / 8), or (-1)^s * m / 8 where e
    is 0.
    """
    import numpy as np

    code = np.arange(64)
    exponent, mantissa = (code >> 3) & 3, (code & 7) / 8
    size = np.where(exponent == 0, mantissa, 2.0 ** (exponent - 1) * (1 + mantissa))
    return np.where(code >> 5 == 1, -size, size).astype(np.float32)


def codes_of_three_bytes(packed: np.ndarray) -> np.ndarray:
    """The 6-bit codes [rows, 4 n / 3] that bytes [rows, n] hold, the first one in the lowest bits; n: threes."""
    import numpy as np

    first, second, third = (packed[:, byte::3].astype(np.uint16) for byte in range(3))
    codes = [first & 63, (first >> 6) | (second & 15) << 2, (second >> 4) | (third & 3) << 4, third >> 2]
    return np.stack(codes, -1).reshape(len(packed), -1)


def e4m3_of(values: np.ndarray) -> np.ndarray:
    """Uint8 [codes], the E4M3 byte of each of these numbers [codes], which E4M3 has, too; -0 stays -0."""
    import numpy as np

    e4m3, small = e4m3_values(), values[:, None]
    return ((e4m3 == small) & (np.signbit(e4m3) == np.signbit(small))).argmax(1).astype(np.uint8)


def as_bytes_array(weight: Numbers) -> np.ndarray:
    """Numbers of one byte as uint8 of the same shape; numpy knows no float8, so torch views them.

    SourceError when a number has more than one byte.
    """
    import numpy as np

    if hasattr(weight, "detach"):
        import torch

        if weight.element_size() != 1:
            raise SourceError(f"float8 numbers are bytes, found {weight.dtype}")
        weight = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.asarray(weight, np.uint8)


def as_array(value: Numbers) -> np.ndarray:
    """A torch tensor or an array, as an array of the same shape and dtype."""
    import numpy as np

    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def as_floats(value: Numbers) -> np.ndarray:
    """Numbers of any shape as float32; numpy knows no bfloat16, so torch widens it."""
    import numpy as np

    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value, np.float32)
