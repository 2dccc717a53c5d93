"""`gptq`: the layout of AutoGPTQ and GPTQModel, version 1 ("gptq"); `gptq_v2.py` is version 2.

For a linear called P with out rows, in columns, G groups and b bits: `P.qweight` I32 [in * b / 32, out], packed along
the input columns; `P.qzeros` I32 [G, out * b / 32], packed along the output rows; `P.scales` F16 [G, out]; `P.g_idx`
I32 [in], the group of each input column. The weight is (code - zero point) * scale.

Version 1 stores every zero point less one, version 2 as it is. Readers undo that by adding 1 to every field of a word
in a single addition, so a zero point of 0 borrows from its neighbour, and is written by a single subtraction.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from outlierq.core.model import LinearSite
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.clients import byte_codes, client_facts, one_scheme, unsigned_zero_points
from outlierq.export.declared import holds_experts
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.ops.packing import WORD, pack, pack_down
from outlierq.recipe.patterns import HEAD

if TYPE_CHECKING:
    import torch

WIDTHS = (2, 3, 4, 8)
VERSION_NAMES = {1: "gptq", 2: "gptq_v2"}


class GptqFormat(Format, name="gptq"):
    """Version 1; `gptq_v2.py` derives the other. version: of how zero points are stored."""

    version: ClassVar[int] = 1
    scale_dtype = "float16"  # what its readers expect, whatever the model's dtype

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return f"gptq is written for Linear layers only, this is a {site.kind}"
        plain = (scheme.kind, scheme.scales, scheme.activations) == ("int", "plain", None)
        if not plain or scheme.bits not in WIDTHS:
            return f"gptq stores int weights of 2, 3, 4 or 8 bits with 16-bit inputs, not {scheme}"
        for name, count in (("columns", site.in_features), ("output rows", site.out_features)):
            if count * scheme.bits % WORD:
                return f"gptq packs {name} into whole words, and {count} of {scheme.bits} bits do not fill them"
        return None

    @classmethod
    def conflict(cls, schemes: Collection[QuantScheme]) -> str | None:
        """Why these schemes cannot stand in one checkpoint."""
        for key in ("bits", "symmetric", "group_size"):
            fault = one_scheme("gptq", {getattr(scheme, key) for scheme in schemes}, key)
            if fault:
                return fault
        return None

    @classmethod
    def clients(cls, schemes: Collection[QuantScheme]) -> list[str]:
        """Which programs load it, one line each: they load both versions alike."""
        return client_facts("gptq", schemes)

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """(name, dtype, shape) of every tensor that replaces the site's weight."""
        stem, rows, columns = site.weight.removesuffix(".weight"), site.out_features, site.in_features
        groups = scheme.groups(columns)
        return [
            (f"{stem}.qweight", "I32", (columns * scheme.bits // WORD, rows)),
            (f"{stem}.qzeros", "I32", (groups, rows * scheme.bits // WORD)),
            (f"{stem}.scales", "F16", (groups, rows)),
            (f"{stem}.g_idx", "I32", (columns,)),
        ]

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs`. A symmetric weight gets the zero point 2^(bits - 1) everywhere.

        qweight: int32 [in * bits / 32, out]. qzeros: int32 [groups, out * bits / 32]. scales: [groups, out].
        g_idx: int32 [in].
        """
        import torch

        stem, bits = site.weight.removesuffix(".weight"), quantized.scheme.bits
        codes = byte_codes(site, quantized)
        zeros = pack(unsigned_zero_points(quantized).T, bits)
        if self.version == 1:
            ones = torch.ones(1, site.out_features, dtype=torch.uint8)
            zeros = zeros - pack(ones, bits)  # int32 wraps, as the readers' addition does
        width = quantized.scheme.columns_per_group(site.in_features)
        return {
            f"{stem}.qweight": pack_down(codes, bits),
            f"{stem}.qzeros": zeros,
            f"{stem}.scales": quantized.scale.T.contiguous(),
            f"{stem}.g_idx": torch.arange(site.in_features, dtype=torch.int32) // width,
        }

    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any]:
        """What its readers look for in config.json.

        What is kept is named in `dynamic`, the only place that vLLM and GPTQModel both read: without it they take
        every linear for a quantized one but the head, for which there is `lm_head`.
        """
        scheme = next(scheme for _, scheme in sites if scheme is not None)
        head = [site for site, own in sites if site.block is None and own is not None]
        unquantized = [module for module in kept if module.rpartition(".")[2] != HEAD]
        config = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": bool(head),
            "pack_dtype": "int32",
            "checkpoint_format": VERSION_NAMES[self.version],
        }
        if unquantized:
            config["dynamic"] = {f"-:^{_pattern(module)}$": {} for module in unquantized}
        return config


def _pattern(module: str) -> str:
    """An expression for a kept module, and for each expert of one that holds them together."""
    escaped = module.replace(".", r"\.")
    return rf"{escaped}(\..*)?" if holds_experts(module) else escaped
