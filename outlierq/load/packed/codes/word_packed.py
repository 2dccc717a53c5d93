"""GPTQ and AWQ checkpoints presented as plain ones: what both layouts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from outlierq.core.dtypes import DTYPES
from outlierq.core.errors import SourceError
from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Parts, Shaped
from outlierq.load.packed.decoded import DecodedCheckpoint, checked_scales
from outlierq.load.packed.described import check_member, nothing_packed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from outlierq.core.model import Checkpoint

CODES = ".qweight"


@dataclass(frozen=True)
class WordPacked(StoredLinear):
    """How one linear is stored. scheme: with zero points."""

    scheme: QuantScheme


class WordPackedCheckpoint(DecodedCheckpoint):
    """A checkpoint with packed codes.

    codes: stored tensors -> `QuantTensor`. check: SourceError when headers, or tensors, have other shapes than the
    scheme asks for. dense: stored tensors -> float32 [out, in]; left out, what the codes mean.
    """

    linears: dict[str, WordPacked]

    def __init__(
        self,
        stored: Checkpoint,
        linears: Mapping[str, WordPacked],
        codes: Callable[[Parts, WordPacked], QuantTensor],
        check: Callable[[Mapping[str, Shaped], QuantScheme, tuple[int, int]], None],
        dense: Callable[[Parts, WordPacked], np.ndarray] | None = None,
    ):
        super().__init__(stored, linears)
        self._codes, self._check, self._dense = codes, check, dense

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""
        import torch

        linear, parts = self.linears[name], self.parts(name)
        if self._dense is not None:
            return torch.from_numpy(self._dense(parts, linear))
        return self._codes(parts, linear).dequantize()

    def check_shapes(self, name: str) -> None:
        """SourceError when a stored tensor has another shape than the scheme asks for."""
        linear = self.linears[name]
        headers = {role: self.original.tensors[member] for role, member in linear.members.items()}
        self._check(headers, linear.scheme, linear.shape)

    def check_scales(self, name: str) -> None:
        """SourceError when a scale is no finite number, or 0 over codes that are not."""
        linear = self.linears[name]
        scale = self.original.read(linear.members["scales"])

        def decode(empty: torch.Tensor) -> np.ndarray:
            parts = {**self.parts(name, ("scales",)), "scales": empty}
            if self._dense is not None:
                return self._dense(parts, linear)
            return self._codes(parts, linear).dequantize().numpy()

        checked_scales(name, scale, decode, signed=True)

    def quantized(self, name: str) -> QuantTensor:
        """Codes, scales and zero points of a packed weight; symmetric when every zero point is the middle one."""
        return as_symmetric(self._codes(self.parts(name), self.linears[name]))


def stems_of(stored: Checkpoint) -> list[str]:
    """Every module that is stored packed; SourceError when there is none."""
    stems = [name.removesuffix(CODES) for name in stored.tensors if name.endswith(CODES)]
    if not stems:
        raise nothing_packed(stored)
    return stems


def members_of(stored: Checkpoint, stem: str, roles: Iterable[str]) -> dict[str, str]:
    """Stored names by role; SourceError when one is missing."""
    members = {role: f"{stem}.{role}" for role in roles}
    lost = [name for name in members.values() if name not in stored.tensors]
    if lost:
        raise SourceError(f"{stored.source} has no {lost[0]}")
    for role, name in members.items():
        check_member(stored.tensors[name], role)
    return members


def scheme_of(stem: str, bits: int, group_size: int, dtype: str, columns: int) -> QuantScheme:
    """The scheme of a stored weight. Zero points are stored even where the config says `sym`, so they are read."""
    size = None if group_size in (None, -1) else group_size
    if size is not None and (size < 1 or columns % size):
        raise SourceError(f"groups of {group_size} columns do not divide the {columns} columns of {stem}")
    return QuantScheme(bits, size, symmetric=False, scale_dtype=DTYPES[dtype][0])


def finished(codes: np.ndarray, zero_point: np.ndarray, scales: torch.Tensor, scheme: QuantScheme) -> QuantTensor:
    """A `QuantTensor` of uint8 codes [out, in], uint8 zero points [out, groups] and stored scales [groups, out].

    SourceError when the scheme is symmetric and a zero point is not the middle one.
    """
    import numpy as np
    import torch

    scale = scales.T.clone(memory_format=torch.contiguous_format)
    middle = 1 << (scheme.bits - 1)
    if not scheme.symmetric:
        return QuantTensor(_tensor(codes), scale, _tensor(zero_point), scheme)
    if not (zero_point == middle).all():
        raise SourceError(f"a symmetric weight of {scheme.bits} bits has zero points other than {middle}")
    return QuantTensor(_tensor((codes - np.uint8(middle)).view(np.int8)), scale, None, scheme)  # wraps below 0


def as_symmetric(quantized: QuantTensor) -> QuantTensor:
    """The same numbers [out, in] without zero points where each of them is the middle one, else as they are."""
    import torch

    middle = 1 << (quantized.scheme.bits - 1)
    if quantized.zero_point is None or not bool((quantized.zero_point == middle).all()):
        return quantized
    codes = (quantized.codes.to(torch.uint8) - middle).view(torch.int8)  # wraps below 0, as two's complement does
    return QuantTensor(codes, quantized.scale, None, replace(quantized.scheme, symmetric=True))


def _tensor(values: np.ndarray) -> torch.Tensor:
    """A contiguous torch tensor."""
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))
