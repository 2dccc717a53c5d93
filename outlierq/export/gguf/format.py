"""`gguf`: one file with weights, metadata and tokenizer, for llama.cpp. How its blocks are packed: `blocks.py`.

Weights that are not quantized keep their dtype, vectors become float32. Llama's rotary embedding pairs neighbouring
rows here and rows half a head apart in transformers, so the rows of its queries and keys are in another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

from outlierq.core.errors import RecipeError
from outlierq.core.gguf.mixes import Shape, type_in_mix
from outlierq.core.gguf.types import block_types
from outlierq.core.machine.installed import needs_extra
from outlierq.core.model import (
    EMBEDDING,
    EXPERT_COUNTS,
    Checkpoint,
    Frame,
    LinearSite,
    StudiedModel,
    TensorInfo,
    largest,
)
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme, gguf_scheme
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.export.gguf.blocks import encode_blocks, ggml_type, held_as
from outlierq.export.gguf.framed import framed_header
from outlierq.export.gguf.header import ARCHITECTURES, file_type, gguf_header, rope_factors
from outlierq.export.layout import Layout, OutputTensor, Place

if TYPE_CHECKING:
    import torch
    from gguf import TensorNameMap

FILE_NAME = "model.gguf"
ROPE_FACTORS, HEADER = "rope_freqs.weight", "header"
KEPT_FILES = ("LICENSE", "LICENCE", "NOTICE", "README")
ALIGNMENT = 32
# The rows of these are in ggml's rotary order where the architecture is "llama".
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@dataclass(frozen=True)
class GgufFormat(Format, name="gguf"):
    """One file. Names and the order of some rows depend on the architecture that the config names.

    frame: of the file that everything but the weights is taken from, None where the config and tokenizer tell it.
    """

    frame: Frame | None = None

    scale_dtype = "float16"
    reads_back = False  # tensors have other names and orders there
    container = "gguf"
    copies_rows = False
    holds_types = True
    no_new_biases = "llama.cpp reads of most architectures only the biases that their models usually have"

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The format for the model of a checkpoint, in the frame that it has."""
        return cls(checkpoint.config, checkpoint.frame)

    @classmethod
    def scheme_faults(cls, scheme: QuantScheme) -> list[str]:
        """It has two-level scales of integers; what a width cannot have is said of each linear."""
        return []

    def __post_init__(self) -> None:
        """OutlierqError where gguf is not installed."""
        needs_extra("gguf")

    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""
        if site.kind not in ("Linear", EMBEDDING):
            return f"gguf is written for models of Linear layers only, this is a {site.kind}"
        kind = ggml_type(scheme)
        if kind is None:
            return f"gguf stores int4, int8 symmetric or mxfp4 with scales of 32 columns or a multiple, not {scheme}"
        columns = block_types()[kind].columns
        if site.in_features % columns:
            return f"gguf stores blocks of {columns} columns as {kind}, and {site.in_features} is no multiple of it"
        return None

    def instead(self, site: LinearSite, scheme: QuantScheme) -> tuple[QuantScheme, str] | None:
        """The nearest scheme for a width that its blocks do not divide, and why; None where none is needed."""
        kind = ggml_type(scheme)
        columns = 1 if kind is None else block_types()[kind].columns
        if kind is None or not site.in_features % columns or block_types()[kind].instead is None:
            return None
        fault = f"{site.in_features} columns are not a multiple of {columns}"
        if scheme.type is None:
            return replace(scheme, scales="plain"), f"plain scales (Q4_1): {fault}"
        other = block_types()[kind].instead
        return gguf_scheme(str(other)), f"{other} instead of {kind}: {fault}"

    def type_in_mix(self, mix: str, site: LinearSite, model: StudiedModel) -> str:
        """What llama.cpp's rules say of the tensor under its name in the file."""
        part = _part(self._name(site.weight))
        config = model.skeleton.config.get_text_config()
        heads = largest(config, "num_attention_heads", 1)
        shape = Shape(
            layers=len(model.structure.blocks),
            sharing=heads // max(1, largest(config, "num_key_value_heads", heads)),
            experts=max(largest(config, key) for key in EXPERT_COUNTS),
        )
        has_output = any(_part(self._name(other.weight)) == "output" for other in model.structure.outside_sites)
        return type_in_mix(mix, part, site.block, site.in_features, shape, tied=not has_output)

    def approximation(self, scheme: QuantScheme) -> str | None:
        """What the format rounds, None when it is exact."""
        if ggml_type(scheme) != "Q4_1" or scheme.type is not None:
            return None
        return "Q4_1 stores zero point x scale as float16: each group is moved by up to 1 / 2048 of that product"

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """One tensor of bytes: [out, bytes of a row]."""
        kind = held_as(scheme)
        row = site.in_features // kind.columns * kind.nbytes
        return [(self._name(site.weight), "U8", (site.out_features, row))]

    def plain_spec(self, info: TensorInfo) -> TensorSpec:
        """What becomes of a tensor that is not quantized: vectors are float32 in every GGUF file."""
        if self._in_own_names:
            return info.name, info.dtype, info.shape
        return gguf_name(info.name), "F32" if len(info.shape) == 1 else info.dtype, info.shape

    def plain(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The tensor of `plain_spec`, in the same shape; rows in the order of the file."""
        if self._in_own_names:
            return name, tensor
        name = gguf_name(name)
        heads = self._heads(name)
        tensor = tensor if heads is None else tensor[_rotated_rows(len(tensor), heads)]
        return name, tensor.float() if tensor.ndim == 1 else tensor

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensor of `tensor_specs`: blocks, uint8 [out, bytes of a row]."""
        name = self._name(site.weight)
        heads = self._heads(name)
        return {
            name: encode_blocks(site, quantized, None if heads is None else _rotated_rows(site.out_features, heads))
        }

    def row_order(self, site: LinearSite) -> dict[str, torch.Tensor]:
        """What a decoder must know beside the bytes: the heads over which rows are reordered, 0 when they are not."""
        import torch

        return {"heads": torch.tensor(self._heads(self._name(site.weight)) or 0)}

    @property
    def _in_own_names(self) -> bool:
        """Whether the tensors of the model are those of the file that the frame is of."""
        return self.frame is not None and self.frame.own_names

    def _name(self, name: str) -> str:
        """The name of a tensor in the file."""
        return name if self._in_own_names else gguf_name(name)

    def _heads(self, name: str) -> int | None:
        """Number of heads whose rows the file has in rotary order, None where rows are in the model's order."""
        part = name.split(".")[-2]
        if (
            self._in_own_names
            or part not in ROTATED
            or ARCHITECTURES.get(str(self.config.get("model_type"))) != "llama"
        ):
            return None
        return int(self.config.get(ROTATED[part]) or self.config["num_attention_heads"])

    def make_layout(
        self, tensors: Sequence[OutputTensor], schemes: Mapping[LinearSite, QuantScheme], source: Checkpoint, shard: int
    ) -> Layout:
        """One file: metadata and tensor headers, then every tensor at a multiple of 32 bytes."""
        import numpy as np

        types = {self._name(site.weight): held_as(scheme).name for site, scheme in schemes.items()}
        if self.frame is not None and self._in_own_names:
            return _framed_layout(self.frame, tensors, types)
        factors = np.array(rope_factors(source.config), "<f4")
        own = [OutputTensor(ROPE_FACTORS, "F32", factors.shape, HEADER)] if factors.size else []
        entries = [(t.name, types.get(t.name, t.dtype), t.shape, t.nbytes) for t in (*own, *tensors)]
        header, differences = gguf_header(source, entries)
        # It depends on the config alone, so it is written with the header and belongs to no unit of work.
        places = {tensor.name: Place(tensor, FILE_NAME, len(header)) for tensor in own}
        header += factors.tobytes() + b"\0" * (-factors.nbytes % ALIGNMENT)
        offset = len(header)
        for tensor in tensors:
            places[tensor.name] = Place(tensor, FILE_NAME, offset)
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        return Layout(places, {FILE_NAME: header}, {FILE_NAME: offset}, differences)

    def keeps_file(self, name: str) -> bool:
        """Whether a file beside the weights is carried over; config and tokenizer are inside the GGUF file."""
        return name.upper().startswith(KEPT_FILES)

    def check_complete(self, folder: Path, layout: Layout) -> None:
        """Its header was compared with the layout; there is no library to ask that reads a file by its header alone."""

    def quantization_config(self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None) -> None:
        """GGUF files have no config.json."""


def _framed_layout(frame: Frame, tensors: Sequence[OutputTensor], types: Mapping[str, str]) -> Layout:
    """The layout in a frame: tensors in its order. types: ggml's of those that are quantized, by name."""
    from gguf import GGMLQuantizationType

    outputs = {tensor.name: tensor for tensor in tensors}
    entries = []
    for tensor in frame.tensors:
        kind = types.get(tensor.name, tensor.type)
        number = int(GGMLQuantizationType[kind]) if tensor.name in types else tensor.number
        entries.append((replace(tensor, type=kind, number=number), outputs[tensor.name].nbytes))
    most = file_type((tensor.type, nbytes) for tensor, nbytes in entries if tensor.name in types) if types else None
    header = framed_header(frame, entries, most)
    offset, places = len(header), {}
    for tensor, nbytes in entries:
        places[tensor.name] = Place(outputs[tensor.name], FILE_NAME, offset)
        offset += nbytes + -nbytes % frame.alignment
    return Layout(places, {FILE_NAME: header}, {FILE_NAME: offset})


def _part(name: str) -> str:
    """What a weight of a file is in its block ("attn_v"), or outside ("output")."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _rotated_rows(rows: int, heads: int) -> torch.Tensor:
    """[out] the model's row at each place of the file: row i of a head's first half, then row i of its second."""
    import torch

    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor as transformers calls it; RecipeError when it has none."""
    number = re.search(r"\.(\d+)\.", name)
    # Asked for block 0, since the table lists every block apart.
    asked = name if number is None else f"{name[: number.start()]}.0.{name[number.end() :]}"
    translated: str | None = _names().get_name(asked, try_suffixes=(".weight", ".bias"))
    if translated is None:
        raise RecipeError(
            f"{name} has no name in a GGUF file of this architecture", hint="use another export.format for this model"
        )
    return translated if number is None else translated.replace("blk.0.", f"blk.{number[1]}.")


@cache
def _names() -> TensorNameMap:
    """gguf's own table of names; that of Llama holds those of Mistral and Qwen 2, too."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
