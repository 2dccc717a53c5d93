"""`gguf`: one file with weights, metadata and tokenizer, for llama.cpp. Blocks of 32 columns, each with its own scale.

| our scheme | ggml type | a block of 32 | exact |
|---|---|---|---|
| int4 symmetric | Q4_0 | f16 d, 32 nibbles q: d * (q - 8) | yes |
| int4 asymmetric | Q4_1 | f16 d, f16 m, 32 nibbles q: d * q + m, m = -zero * d | up to the rounding of m to float16 |
| int8 symmetric | Q8_0 | f16 d, 32 int8 q: d * q | yes |

A larger group is written as several blocks with the same scale. The K-quants (Q4_K, ...) round scales to 6 bits beside
a scale of scales; no grid of ours has such scales, so none is written. Weights that are not quantized keep their
dtype, vectors become float32. Llama's rotary embedding pairs neighbouring rows here and rows half a head apart in
transformers, so the rows of its queries and keys are in another order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import RecipeError
from outlierq.core.model import Checkpoint, LinearSite, TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import QuantScheme
from outlierq.export.clients import client_facts, unsigned
from outlierq.export.gguf_header import ARCHITECTURES, gguf_header
from outlierq.export.layout import Layout, OutputTensor, Place

if TYPE_CHECKING:
    import torch

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
FILE_NAME = "model.gguf"
KEPT_FILES = ("LICENSE", "LICENCE", "NOTICE", "README")
ALIGNMENT = 32
# The rows of these are in ggml's rotary order where the architecture is "llama".
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def ggml_type(scheme: QuantScheme) -> str | None:
    """The type that holds a scheme, None when there is none."""
    groups = scheme.group_size is None or scheme.group_size % BLOCK == 0
    plain = scheme.kind == "int" and scheme.activations is None and groups
    return TYPES.get((scheme.bits, scheme.symmetric)) if plain else None


@dataclass(frozen=True)
class GgufFormat:
    """The exporter for one model. config: the content of its config.json."""

    config: Mapping[str, Any] = field(default_factory=dict)

    SCALE_DTYPE = "float16"

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind != "Linear":
            return f"gguf is written for models of Linear layers only, this is a {site.kind}"
        if ggml_type(scheme) is None:
            return f"gguf stores int4, or int8 symmetric, with scales of 32 columns or a multiple of that, not {scheme}"
        if site.in_features % BLOCK:
            return f"gguf stores blocks of {BLOCK} columns, and {site.in_features} is no multiple of it"
        return None

    def approximation(self, scheme: QuantScheme) -> str | None:
        """What the format rounds, None when it is exact."""
        if ggml_type(scheme) != "Q4_1":
            return None
        return "Q4_1 stores zero point x scale as float16: each group is moved by up to 1 / 2048 of that product"

    def clients(self, schemes: Collection[QuantScheme]) -> list[str]:
        """Which programs load it, one line each."""
        return client_facts("gguf", schemes)

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[tuple[str, str, tuple[int, ...]]]:
        """One tensor of bytes: [out, bytes of a row]."""
        row = site.in_features // BLOCK * BLOCK_BYTES[ggml_type(scheme)]
        return [(gguf_name(site.weight), "U8", (site.out_features, row))]

    def plain_spec(self, info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
        """(name, dtype, shape) of a tensor that is not quantized: vectors are float32 in every GGUF file."""
        return gguf_name(info.name), "F32" if len(info.shape) == 1 else info.dtype, info.shape

    def plain(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The tensor of `plain_spec`."""
        name = gguf_name(name)
        heads = self._heads(name)
        tensor = tensor if heads is None else tensor[_rotated_rows(len(tensor), heads)]
        return name, tensor.float() if tensor.ndim == 1 else tensor

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensor of `tensor_specs`."""
        name = gguf_name(site.weight)
        blocks = encode_blocks(site, quantized)
        heads = self._heads(name)
        return {name: blocks if heads is None else blocks[_rotated_rows(len(blocks), heads)]}

    def row_order(self, site: LinearSite) -> dict[str, Any]:
        """What a decoder must know beside the bytes: the heads over which rows are reordered, 0 when they are not."""
        import torch

        return {"heads": torch.tensor(self._heads(gguf_name(site.weight)) or 0)}

    def _heads(self, name: str) -> int | None:
        """Number of heads whose rows the file has in rotary order, None where rows are in the model's order."""
        part = name.split(".")[-2]
        if part not in ROTATED or ARCHITECTURES.get(self.config.get("model_type")) != "llama":
            return None
        return int(self.config.get(ROTATED[part]) or self.config["num_attention_heads"])

    def make_layout(
        self, tensors: Sequence[OutputTensor], sites: Sequence[tuple[LinearSite, QuantScheme]], checkpoint: Checkpoint
    ) -> Layout:
        """One file: metadata and tensor headers, then every tensor at a multiple of 32 bytes."""
        types = {gguf_name(site.weight): ggml_type(scheme) for site, scheme in sites}
        header = gguf_header(checkpoint, [(t.name, types.get(t.name, t.dtype), t.shape, t.nbytes) for t in tensors])
        places, offset = {}, len(header)
        for tensor in tensors:
            places[tensor.name] = Place(tensor, FILE_NAME, offset)
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        return Layout(places, {FILE_NAME: header}, {FILE_NAME: offset})

    def keeps_file(self, name: str) -> bool:
        """Whether a file beside the weights is carried over; config and tokenizer are inside the GGUF file."""
        return name.upper().startswith(KEPT_FILES)

    def quantization_config(self, sites: object, *, also_kept: object = ()) -> None:
        """GGUF files have no config.json."""
        return


def encode_blocks(site: LinearSite, quantized: QuantTensor) -> torch.Tensor:
    """Uint8 [out, bytes of a row] in the order of the model's rows."""
    import torch

    rows, columns = quantized.shape
    kind, repeat = ggml_type(quantized.scheme), quantized.scheme.columns_per_group(columns) // BLOCK
    scale = quantized.scale.repeat_interleave(repeat, 1)
    parts = [_bytes(scale)]
    if kind == "Q8_0":
        return torch.cat([*parts, quantized.codes.view(rows, -1, BLOCK).view(torch.uint8)], -1).view(rows, -1)
    codes, zero_point = unsigned(site, quantized)
    if kind == "Q4_1":
        low = -zero_point.repeat_interleave(repeat, 1).float() * scale.float()
        parts.append(_bytes(low.to(torch.float16)))
    halves = codes.view(rows, -1, 2, BLOCK // 2)
    return torch.cat([*parts, halves[:, :, 0] | halves[:, :, 1] << 4], -1).view(rows, -1)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """Float16 [out, blocks] as bytes [out, blocks, 2]."""
    import torch

    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def _rotated_rows(rows: int, heads: int) -> torch.Tensor:
    """[out] the model's row at each place of the file: row i of a head's first half, then row i of its second."""
    import torch

    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor as transformers calls it; RecipeError when it has none."""
    number = re.search(r"\.(\d+)\.", name)
    # Asked for block 0, since the table lists every block apart.
    asked = name if number is None else f"{name[: number.start()]}.0.{name[number.end() :]}"
    found = _names().get_name(asked, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise RecipeError(
            f"{name} has no name in a GGUF file of this architecture", hint="use another export.format for this model"
        )
    return found if number is None else found.replace("blk.0.", f"blk.{number[1]}.")


@cache
def _names() -> Any:
    """gguf's own table of names; that of Llama holds those of Mistral and Qwen 2, too."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
