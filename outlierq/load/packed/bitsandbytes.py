"""Reads LLM.int8() checkpoints as transformers saves them with bitsandbytes, and computes what bitsandbytes does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from outlierq.core.errors import SourceError
from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.bitsandbytes_4bit import four_bit_checkpoint
from outlierq.load.packed.codes.numbers import Numbers, Parts
from outlierq.load.packed.decoded import DecodedCheckpoint
from outlierq.load.packed.outlier_split import DynamicSplitLinear, SplitCheckpoint, linears_of
from outlierq.load.packed.reading import presents, reads_rows

if TYPE_CHECKING:
    import numpy as np

    from outlierq.core.model import Checkpoint

MAXIMA = ".SCB"


def decode_int8(weight: Numbers, maxima: Numbers) -> np.ndarray:
    """Float32 [out, in]: codes * (SCB / 127). weight: [out, in] int8. maxima: SCB, [out] float32."""
    import numpy as np

    codes = np.asarray(weight)
    if codes.shape[0] != np.asarray(maxima).size:
        raise SourceError(f"{np.asarray(maxima).size} row maxima do not fit {codes.shape[0]} rows of codes")
    return codes.astype(np.float32) * (np.asarray(maxima, np.float32) / np.float32(127)).reshape(-1, 1)


@reads_rows("bitsandbytes", "weight", "SCB")
def int8_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """Output rows [start, stop), float32 [stop - start, in]. SourceError when the tensors do not fit."""
    return torch.from_numpy(decode_int8(stored["weight"][start:stop], stored["SCB"][start:stop]))


class Int8Checkpoint(SplitCheckpoint):
    """An LLM.int8() checkpoint presented as a plain one. threshold: |x| from which a column is an outlier."""

    def __init__(self, stored: Checkpoint, linears: Mapping[str, StoredLinear], threshold: float):
        super().__init__(stored, linears)
        self.threshold = threshold

    def decode(self, parts: Parts) -> np.ndarray:
        """Float32 [out, in]; SourceError when the codes are not in plain rows."""
        if int(parts["weight_format"]) != 0:
            raise SourceError(
                f"{self.source} keeps its codes in the tiled layout {int(parts['weight_format'])}, not in rows",
                hint="save the model again with bitsandbytes 0.45 or later",
            )
        return decode_int8(parts["weight"], parts["SCB"])

    def quantized(self, name: str) -> QuantTensor:
        """SourceError: which columns are multiplied in 16 bits is found in each call."""
        raise SourceError(f"{name} of {self.source} is LLM.int8(), which finds its outlier columns in each call")

    def layer(self, parts: Parts, bias: torch.Tensor | None) -> torch.nn.Module:
        """LLM.int8() with the checkpoint's threshold. parts: weight int8 [out, in], SCB [out]; bias: [out]."""
        return DynamicSplitLinear(parts["weight"], parts["SCB"][:, None] / 127, bias, self.threshold)


@presents("bitsandbytes")
def bitsandbytes_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> DecodedCheckpoint:
    """The presentation of a bitsandbytes folder of 8 or 4 bits. config: its quantization_config."""
    if config.get("load_in_4bit"):
        return four_bit_checkpoint(stored)
    if not config.get("load_in_8bit"):
        raise SourceError(f"{stored.source} is a bitsandbytes checkpoint, but neither of 8 bits nor of 4")
    stems = [name.removesuffix(MAXIMA) for name in stored.tensors if name.endswith(MAXIMA)]
    linears = linears_of(stored, stems, ("weight", "SCB", "weight_format"))
    return Int8Checkpoint(stored, linears, float(config.get("llm_int8_threshold", 6.0)))
