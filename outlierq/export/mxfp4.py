"""`mxfp4`: experts as gpt-oss is published, all of a block in one tensor of blocks and one of scales.

For a fused weight called P: `P_blocks` U8 [experts, out, groups, 16], two E2M1 numbers a byte, that of the even column
in its low half, and `P_scales` U8 [experts, out, groups], exponents of two plus 127 for 32 columns each. Everything but
experts stays in 16 bits. The reader is `load/packed/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from outlierq.core.model import Checkpoint, LinearSite, Piece, TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.clients import Mixture
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.packing import pack_e2m1

if TYPE_CHECKING:
    import torch

COLUMNS, BYTES = 32, 16  # of a group
NAMES = ("gate_up_proj", "down_proj")
KERNELS = "GptOssForCausalLM"  # the only class that transformers has kernels for; any other it must decode


@dataclass(frozen=True)
class Mxfp4Format(Format, name="mxfp4"):
    """Experts in the layout of gpt-oss. piece: where the source has a tensor in one of all experts."""

    piece: Callable[[str], Piece | None]

    joins_experts = True

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The format for the model of a checkpoint."""
        return cls(checkpoint.config, checkpoint.piece)

    @classmethod
    def scheme_faults(cls, scheme: QuantScheme) -> list[str]:
        """Why no linear can be stored like that."""
        if scheme.numbers == "mxfp4" and scheme.activations is None:
            return []
        return [f"kind: mxfp4 stores 4-bit floats with a power of two for 32 columns and 16-bit inputs, not {scheme}"]

    @classmethod
    def expert_clients(cls, schemes: Collection[QuantScheme | None], experts: Mixture) -> list[str]:
        """All that it holds are experts; `clients` has said what there is to say of gpt-oss."""
        is_known = experts.architecture == KERNELS
        return [] if is_known else [f"vLLM, experts: not tried: {experts.architecture} in mxfp4 is documented nowhere"]

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        piece = self.piece(site.weight)
        if piece is None:
            return "mxfp4 holds experts that the source has in one tensor, and nothing else"
        if not piece.transposed:
            return "mxfp4 holds experts that their class keeps as [in, out], as gpt-oss does"
        if not piece.tensor.endswith(NAMES):
            return f"mxfp4 holds experts in tensors called {' and '.join(NAMES)}, by which its readers know them"
        if site.in_features % COLUMNS:
            return f"{scheme} needs columns in groups of {COLUMNS}, and {site.in_features} are no multiple of it"
        return None

    def stacked(self, name: str) -> Piece | None:
        """Where a linear's rows, or a bias, lie in the tensor of all experts."""
        return self.piece(name)

    def role(self, name: str) -> str:
        """What a tensor is of a linear."""
        return name.rpartition("_")[2]

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of the tensors of all experts that the site has a part in."""
        piece = _known(self.piece(site.weight))
        experts, columns, rows = piece.whole
        groups = columns // COLUMNS
        return [
            (f"{piece.tensor}_blocks", "U8", (experts, rows, groups, BYTES)),
            (f"{piece.tensor}_scales", "U8", (experts, rows, groups)),
        ]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The site's rows of these tensors: blocks [out, groups, 16], scales [out, groups]."""
        piece, groups = _known(self.piece(site.weight)), site.in_features // COLUMNS
        blocks = pack_e2m1(quantized.codes).view(site.out_features, groups, BYTES)
        return {f"{piece.tensor}_blocks": blocks, f"{piece.tensor}_scales": quantized.scale}

    def plain_spec(self, info: TensorInfo) -> TensorSpec:
        """A bias of an expert is a row of that of all experts."""
        piece = self.piece(info.name)
        return (info.name, info.dtype, info.shape) if piece is None else (piece.tensor, info.dtype, piece.whole)

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """What its readers look for in config.json."""
        decoded = {} if KERNELS in (self.config.get("architectures") or [KERNELS]) else {"dequantize": True}
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(kept), **decoded}


def _known(piece: Piece | None) -> Piece:
    """The piece of a site that the format holds."""
    assert piece is not None, "no part of a stack"
    return piece
