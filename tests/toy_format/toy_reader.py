"""Reads `toy` checkpoints with numpy alone; shares no code with the writer. It shows what the reader of a format is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.model import StoredLinear
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.packed.codes.numbers import Parts, as_array
from outlierq.load.packed.decoded import DecodedCheckpoint
from outlierq.load.packed.reading import presents, reads_rows

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint

CODES = ".upside_down"


@reads_rows("toy", "upside_down", "scale")
def toy_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> QuantTensor:
    """Output rows [start, stop). stored: upside_down int8 [out, in], scale float32 [out, 1]."""
    import torch

    codes = -1 - as_array(stored["upside_down"])[start:stop]
    return QuantTensor(torch.from_numpy(codes), stored["scale"][start:stop], None, scheme)


class ToyCheckpoint(DecodedCheckpoint):
    """Its linears, decoded when they are read."""

    def decoded(self, name: str) -> torch.Tensor:
        """The linear with this weight, float32 [out, in]."""
        shape, scheme = self.linears[name].shape, QuantScheme(8, None, scale_dtype="float32")
        return toy_rows(self.parts(name), scheme, shape, 0, shape[0]).dequantize()


@presents("toy")
def toy_checkpoint(stored: Checkpoint, config: Mapping[str, Any]) -> ToyCheckpoint:
    """A folder of this format presented as a plain one. config: its quantization_config."""
    stems = [name.removesuffix(CODES) for name in stored.tensors if name.endswith(CODES)]
    linears = {
        f"{stem}.weight": StoredLinear(
            stored.tensors[stem + CODES].shape, {"upside_down": stem + CODES, "scale": f"{stem}.scale"}
        )
        for stem in stems
    }
    return ToyCheckpoint(stored, linears)
