"""The two tables over all layouts: what decodes a stored linear, and what presents a compressed checkpoint.

It lies above `packed/` and `gguf/`, which know nothing of it. A new layout is a file there and a row in a table here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.load.gguf.blocks import gguf_rows
from outlierq.load.packed.awq import awq_checkpoint, awq_rows
from outlierq.load.packed.bits import pack_quantized_rows
from outlierq.load.packed.bitsandbytes import int8_checkpoint, int8_rows
from outlierq.load.packed.byte_codes import byte_rows
from outlierq.load.packed.compressed_tensors import compressed_tensors_checkpoint
from outlierq.load.packed.described import check_described
from outlierq.load.packed.e2m1 import e2m1_rows
from outlierq.load.packed.gptq import gptq_checkpoint, gptq_rows
from outlierq.load.packed.numbers import Parts
from outlierq.load.packed.outlier_split import split_checkpoint, split_rows

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when it is plain; otherwise the same checkpoint with its weights decoded to float32.

    What else the checkpoint asks for (rounded inputs, a rounded KV cache, linears of another kind) is put into a model
    by the result's `install`. SourceError when the compression cannot be decoded and run here.
    """
    config = checkpoint.config.get("quantization_config")
    if not config:
        return checkpoint
    check_described(checkpoint.source, config)
    method = config.get("quant_method")
    presentation = PRESENTATIONS.get(str(method))
    if presentation is None:
        raise SourceError(
            f"{checkpoint.source} is compressed with {method}, which is not decoded here",
            hint="compressed-tensors, gptq, awq and bitsandbytes 8-bit are; evaluate others with their own runtime",
        )
    return presentation(checkpoint, config)


# By the `quant_method` of a quantization_config.
PRESENTATIONS: dict[str, Callable[[Checkpoint, dict[str, Any]], Checkpoint]] = {
    "awq": awq_checkpoint,
    "bitsandbytes": int8_checkpoint,
    "compressed-tensors": compressed_tensors_checkpoint,
    "gptq": gptq_checkpoint,
    "outlierq": split_checkpoint,
}


def decode_rows(
    stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int, *, format: str = ""
) -> QuantTensor | torch.Tensor:
    """Output rows [start, stop) of a linear as it lies on disk, for comparison with what was meant.

    A decoder in `ROW_DECODERS` gives a `QuantTensor` where codes and scales can be told from the stored tensors (then
    each of them must be the one meant, bit for bit), or the dense rows in the dtype they are stored in.
    Weights are [out, in] here, also where the file holds [in, out]. shape: (out, in). start: a multiple of 32 (zero
    points are packed along rows) and of a block's height. format: its name, where the tensors do not tell it
    (GPTQ's versions). SourceError when the tensors do not fit.
    """
    if format == "gptq-v2":
        return gptq_rows(stored, scheme, shape, start, stop, version=2)
    for roles, decoder in ROW_DECODERS:
        if roles <= stored.keys():
            return decoder(stored, scheme, shape, start, stop)
    raise SourceError(f"no decoder is known for a linear stored as {', '.join(sorted(stored))}")


def _dense_rows(stored: Parts, scheme: QuantScheme, shape: tuple[int, int], start: int, stop: int) -> torch.Tensor:
    """A plain weight."""
    return stored["weight"][start:stop]


RowDecoder = Callable[[Parts, QuantScheme, tuple[int, int], int, int], "QuantTensor | torch.Tensor"]

# By the tensors that a format cannot do without; the first that fits is taken, so the most particular comes first.
ROW_DECODERS: tuple[tuple[frozenset[str], RowDecoder], ...] = (
    (frozenset({"weight_packed", "weight_scale", "weight_shape"}), pack_quantized_rows),
    (frozenset({"weight_packed", "weight_scale"}), e2m1_rows),
    (frozenset({"qweight", "qzeros", "scales", "g_idx"}), gptq_rows),
    (frozenset({"qweight", "qzeros", "scales"}), awq_rows),
    (frozenset({"weight", "heads"}), gguf_rows),
    (frozenset({"weight", "SCB"}), int8_rows),
    (frozenset({"weight", "weight_scale", "outlier_columns", "outlier_weight"}), split_rows),
    (frozenset({"weight", "weight_scale"}), byte_rows),
    (frozenset({"weight"}), _dense_rows),
)
