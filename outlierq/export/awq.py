"""`awq`: the GEMM layout of AutoAWQ, for 4-bit weights with zero points. vLLM and transformers load it by default.

For a linear called P with out rows, in columns and G groups: `P.qweight` I32 [in, out / 8], `P.qzeros` I32 [G, out / 8]
and `P.scales` F16 [G, out]; the weight is (code - zero point) * scale. A word holds eight neighbouring output rows in
the order `ORDER`, lowest bits first. The config has one group size for the whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.clients import byte_codes, one_scheme, unsigned_zero_points
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.compiled import packing as native_packing

if TYPE_CHECKING:
    import torch

BITS = 4
PER_WORD = 8
# Nibble k of a word is output row 8 * c + ORDER[k] (AutoAWQ, awq/utils/packing_utils.py).
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD_ROWS = 64  # rows of words that are transposed together


class AwqFormat(Format, name="awq"):
    """The GEMM layout of AutoAWQ."""

    scale_dtype = "float16"  # what its readers expect, whatever the model's dtype

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return f"awq has no {site.kind} layer"
        if (scheme.kind, scheme.bits, scheme.scales) != ("int", BITS, "plain") or scheme.activations is not None:
            return f"awq stores int4 weights with 16-bit inputs, not {scheme}"
        if site.block is None:
            return "the readers of awq expect linears outside of the blocks in 16 bits"
        if site.out_features % PER_WORD:
            return f"awq packs {PER_WORD} output rows into a word, and {site.out_features} is no multiple of it"
        return None

    @classmethod
    def conflict(cls, schemes: Collection[QuantScheme]) -> str | None:
        """Why these schemes cannot stand in one checkpoint; symmetric and asymmetric ones can."""
        return one_scheme("awq", {scheme.group_size for scheme in schemes}, "group_size")

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of every tensor that replaces the site's weight."""
        stem, rows, columns = site.weight.removesuffix(".weight"), site.out_features, site.in_features
        groups = scheme.groups(columns)
        return [
            (f"{stem}.qweight", "I32", (columns, rows // PER_WORD)),
            (f"{stem}.qzeros", "I32", (groups, rows // PER_WORD)),
            (f"{stem}.scales", "F16", (groups, rows)),
        ]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs`. A symmetric weight gets the zero point 8 everywhere.

        qweight: int32 [in, out / 8]. qzeros: int32 [groups, out / 8]. scales: [groups, out].
        """
        stem = site.weight.removesuffix(".weight")
        return {
            f"{stem}.qweight": _words(byte_codes(site, quantized)),
            f"{stem}.qzeros": _words(unsigned_zero_points(quantized)),
            f"{stem}.scales": quantized.scale.T.contiguous(),
        }

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """What its readers look for in config.json."""
        sizes = {scheme.group_size for _, scheme in sites if scheme is not None}
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": next(iter(sizes)) or -1,
            "zero_point": True,
            "modules_to_not_convert": list(kept),
        }


def _words(values: torch.Tensor) -> torch.Tensor:
    """Codes [out, n] as int32 [n, out / 8], on the CPU; signed ones are stored plus 8.

    Eight rows become a row of words, then some such rows are transposed together: so that words are moved, not codes.
    """
    import numpy as np
    import torch

    values = values.cpu().contiguous()
    compiled = native_packing.awq_words(values, 8 if values.dtype == torch.int8 else 0)
    if compiled is not None:
        return compiled
    codes = values.numpy()
    flip = np.uint8(0x88 if codes.dtype == np.int8 else 0)
    eights = codes.view(np.uint8).reshape(-1, PER_WORD, codes.shape[1])
    words = np.empty((codes.shape[1], len(eights)), np.uint32)
    for start in range(0, len(eights), WORD_ROWS):
        rows = (eights[start : start + WORD_ROWS] & np.uint8(15)).transpose(1, 0, 2)
        low = [(rows[ORDER[k]] | rows[ORDER[k + 1]] << np.uint8(4)) ^ flip for k in range(0, PER_WORD, 2)]
        pairs = [low[k].astype(np.uint16) | low[k + 1].astype(np.uint16) << np.uint16(8) for k in (0, 2)]
        words[:, start : start + WORD_ROWS] = (pairs[0] | pairs[1].astype(np.uint32) << np.uint32(16)).T
    return torch.from_numpy(words.view(np.int32))
