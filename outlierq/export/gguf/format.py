"""`gguf`: one file with weights, metadata and tokenizer, for llama.cpp. Blocks of 32 columns, each with its own scale.

| our scheme | ggml type | a block of 32 | exact |
|---|---|---|---|
| int4 symmetric | Q4_0 | f16 d, 32 nibbles q: d * (q - 8) | yes |
| int4 asymmetric | Q4_1 | f16 d, f16 m, 32 nibbles q: d * q + m, m = -zero * d | up to the rounding of m to float16 |
| int8 symmetric | Q8_0 | f16 d, 32 int8 q: d * q | yes |
| int4 asymmetric, `scales: two-level` | Q4_K | see `_superblock` | yes |
| mxfp4 | MXFP4 | u8 e, 32 nibbles q: 2^(e - 127) * E2M1(q) | yes |

A larger group is written as several blocks with the same scale. Q4_K has superblocks of 256 columns: 6-bit scales and
minima of 8 groups in units of two float16. Weights that are not quantized keep their
dtype, vectors become float32. Llama's rotary embedding pairs neighbouring rows here and rows half a head apart in
transformers, so the rows of its queries and keys are in another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

from outlierq.core.errors import RecipeError
from outlierq.core.machine.installed import needs_extra
from outlierq.core.model import Checkpoint, Frame, LinearSite, TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.clients import byte_codes
from outlierq.export.format import Format, Sites, TensorSpec
from outlierq.export.gguf.framed import framed_header
from outlierq.export.gguf.header import ARCHITECTURES, file_type, gguf_header, rope_factors
from outlierq.export.layout import Layout, OutputTensor, Place
from outlierq.ops.compiled import packing as native_packing
from outlierq.ops.packing import e2m1_codes, interleave, pack_halves

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import TensorNameMap

BLOCK = 32
SUPERBLOCK = 256
# Columns of a block and its bytes.
BLOCKS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "MXFP4": (32, 17), "Q4_K": (SUPERBLOCK, 144)}
# By kind, bits, symmetry and scales.
TYPES = {
    ("int", 4, True, "plain"): "Q4_0",
    ("int", 4, False, "plain"): "Q4_1",
    ("int", 8, True, "plain"): "Q8_0",
    ("int", 4, False, "two-level"): "Q4_K",
    ("float", 4, True, "power-of-two"): "MXFP4",
}
FILE_NAME = "model.gguf"
ROPE_FACTORS, HEADER = "rope_freqs.weight", "header"
KEPT_FILES = ("LICENSE", "LICENCE", "NOTICE", "README")
ALIGNMENT = 32
# The rows of these are in ggml's rotary order where the architecture is "llama".
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def ggml_type(scheme: QuantScheme) -> str | None:
    """The type that holds a scheme, None when there is none."""
    if scheme.activations is not None or (scheme.group_size is not None and scheme.group_size % BLOCK):
        return None
    return TYPES.get((scheme.kind, scheme.bits, scheme.symmetric, scheme.scales))


def _held_as(scheme: QuantScheme) -> str:
    """The type of a scheme to which `obstacle` has no objection."""
    kind = ggml_type(scheme)
    assert kind is not None, f"gguf does not hold {scheme}"
    return kind


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
        if site.kind != "Linear":
            return f"gguf is written for models of Linear layers only, this is a {site.kind}"
        kind = ggml_type(scheme)
        if kind is None:
            return f"gguf stores int4, int8 symmetric or mxfp4 with scales of 32 columns or a multiple, not {scheme}"
        columns, _ = BLOCKS[kind]
        if site.in_features % columns:
            return f"gguf stores blocks of {columns} columns as {kind}, and {site.in_features} is no multiple of it"
        return None

    def instead(self, site: LinearSite, scheme: QuantScheme) -> tuple[QuantScheme, str] | None:
        """The nearest scheme for a width that Q4_K cannot have, and why; None where none is needed."""
        if ggml_type(scheme) != "Q4_K" or not site.in_features % SUPERBLOCK:
            return None
        fault = f"{site.in_features} columns are not a multiple of {SUPERBLOCK}"
        return replace(scheme, scales="plain"), f"plain scales (Q4_1): {fault}"

    def approximation(self, scheme: QuantScheme) -> str | None:
        """What the format rounds, None when it is exact."""
        if ggml_type(scheme) != "Q4_1":
            return None
        return "Q4_1 stores zero point x scale as float16: each group is moved by up to 1 / 2048 of that product"

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """One tensor of bytes: [out, bytes of a row]."""
        columns, nbytes = BLOCKS[_held_as(scheme)]
        row = site.in_features // columns * nbytes
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

        types = {self._name(site.weight): _held_as(scheme) for site, scheme in schemes.items()}
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


def encode_blocks(site: LinearSite, quantized: QuantTensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Uint8 [out, bytes of a row]. order: int64, the model's row at each place; None: as they are."""
    import torch

    codes, kind = byte_codes(site, quantized), _held_as(quantized.scheme)
    blocks = native_packing.gguf_blocks(kind, quantized, order)
    if blocks is not None:
        return blocks
    parts = (_superblock if kind == "Q4_K" else _block)(quantized, codes.cpu().contiguous().view(torch.uint8).numpy())
    blocks = torch.from_numpy(interleave(parts).reshape(len(codes), -1))
    return blocks if order is None else blocks[order]


def _block(quantized: QuantTensor, codes: np.ndarray) -> list[np.ndarray]:
    """The parts of all blocks of 32 columns, each [out, blocks, ...]."""
    import torch

    rows, columns = quantized.shape
    kind, repeat = _held_as(quantized.scheme), quantized.scheme.columns_per_group(columns) // BLOCK
    scale = quantized.scale.cpu().repeat_interleave(repeat, 1)[..., None]
    if kind == "Q8_0":
        return [scale.numpy(), codes.reshape(rows, -1, BLOCK)]
    parts = [scale.numpy()]
    if quantized.zero_point is not None:  # Q4_1
        zero_point = quantized.zero_point.cpu().repeat_interleave(repeat, 1)[..., None]
        parts.append((-zero_point.float() * scale.float()).to(torch.float16).numpy())
    codes = e2m1_codes(codes) if kind == "MXFP4" else codes
    flip = 8 if kind == "Q4_0" else 0  # signed codes are stored plus 8
    return [*parts, pack_halves(codes, BLOCK // 2, flip).reshape(rows, -1, BLOCK // 2)]


def _superblock(quantized: QuantTensor, codes: np.ndarray) -> list[np.ndarray]:
    """The parts of all superblocks of Q4_K: f16 d and f16 m, 12 bytes of scales s and minima z, 128 bytes of codes q.

    A weight is d * s * q - m * z. Scales and minima have 6 bits; bytes 0-3 and 4-7 hold those of groups 0 to 3, with
    the upper two bits of those of groups 4 to 7 above them, whose lower four bits are in bytes 8-11, minima in the high
    halves. Of the codes, 32 bytes hold a group in their low and the next in their high halves.
    """
    import numpy as np

    rows, columns = quantized.shape
    shape = (rows, columns // SUPERBLOCK)
    assert quantized.zero_point is not None and quantized.super_scale is not None, "Q4_K has scales of two levels"
    scale, minimum = (part.cpu().numpy().reshape(*shape, 2, 4) for part in (quantized.scale, quantized.zero_point))
    small = [
        scale[:, :, 0] | scale[:, :, 1] >> 4 << 6,
        minimum[:, :, 0] | minimum[:, :, 1] >> 4 << 6,
        scale[:, :, 1] & 15 | minimum[:, :, 1] << 4,
    ]
    packed = pack_halves(codes, BLOCK).reshape(*shape, SUPERBLOCK // 2)
    return [quantized.super_scale.cpu().numpy(), np.concatenate(small, -1), packed]


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
