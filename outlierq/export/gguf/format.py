"""`gguf`: one file with weights, metadata and tokenizer, for llama.cpp. How its blocks are packed: `blocks.py`.

Weights that are not quantized keep their dtype, vectors become float32. Llama's rotary embedding pairs neighbouring
rows here and rows half a head apart in transformers, so the rows of its queries and keys are in another order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from outlierq.core.errors import SourceError
from outlierq.core.gguf.mixes import ATTENTION, DOWN, Shape, part_in_rules, type_in_mix
from outlierq.core.gguf.types import block_types
from outlierq.core.machine.installed import needs_extra
from outlierq.core.model import (
    EMBEDDING,
    EXPERT_COUNTS,
    Block,
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
from outlierq.export.gguf.architectures import (
    Architecture,
    adjusted,
    architecture_of,
    architectures,
    known_architecture,
    text_of,
    whole_config,
)
from outlierq.export.gguf.blocks import encode_blocks, ggml_type, held_as
from outlierq.export.gguf.framed import framed_header
from outlierq.export.gguf.header import file_type, gguf_header
from outlierq.export.gguf.names import expert_of, gguf_name
from outlierq.export.gguf.rotation import rope_tensors, rounded_bounds
from outlierq.export.layout import Layout, OutputTensor, Place
from outlierq.recipe.patterns import tower_of

if TYPE_CHECKING:
    import torch

FILE_NAME = "model.gguf"
HEADER = "header"
# The linear that makes keys and values of what is compressed for both, and tensors of several matrices.
COMPRESSED_KEYS = re.compile(r"\.kv_b_proj\.")
SEVERAL = re.compile(r"_exps\.weight|attn_[kv]_b\.weight")
# Matrices beside which llama.cpp reads a number, where an architecture has it at all.
SCALED = re.compile(r"attn_(q|k|v|output|qkv|gate)|ffn_(gate|up|down)(_shexp)?")
# Tensors that llama.cpp reads as float32 only.
WIDE = re.compile(r"ffn_gate_inp\.|ssm_conv1d|shortconv\.conv\.")
# The gain of linear attention, which is no 1 less where all others are, and its decay, the logarithm of what is stored.
WHOLE_GAIN, DECAY = ".linear_attn.norm.weight", ".linear_attn.A_log"
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
    stacks_experts = True
    holds_unquantized = True
    reads_back = False  # tensors have other names and orders there
    container = "gguf"
    copies_rows = False
    holds_types = True
    no_new_biases = "llama.cpp reads of most architectures only the biases that their models usually have"

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The format for the model of a checkpoint, in the frame that it has. SourceError for one that has no row."""
        if checkpoint.frame is None:
            known_architecture(checkpoint.config, checkpoint.source)
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
        if COMPRESSED_KEYS.search(site.weight):
            return "llama.cpp has it in two parts, one of them transposed"
        columns = block_types()[kind].columns
        if kind == "NVFP4" and self._no_scale(site):
            return self._no_scale(site)
        if site.in_features % columns:
            return f"gguf stores blocks of {columns} columns as {kind}, and {site.in_features} is no multiple of it"
        return None

    def _no_scale(self, site: LinearSite) -> str | None:
        """Why llama.cpp would not multiply with the number that NVFP4 has beside each matrix; None when it does."""
        part = _part(self._name(site.weight))
        if self.frame is not None:
            return "NVFP4 has a number beside each matrix, for which the frame of another file has no place"
        if not self._architecture.scaled:
            return "NVFP4 has a number beside each matrix, which llama.cpp does not read in this architecture"
        if not SCALED.fullmatch(part) or self.number_in_stack(site.weight) is not None:
            return f"NVFP4 has a number beside each matrix, which is not written for {part}"
        if site.bias is not None and part.startswith("ffn_"):
            return "NVFP4 has a number beside each matrix, which llama.cpp does not read beside biases of this part"
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
        blocks, config = model.structure.blocks, model.skeleton.config.get_text_config()
        heads = largest(config, "num_attention_heads", 1)
        sharing = heads // max(1, largest(config, "num_key_value_heads", heads))
        meant = part_in_rules(part)
        shape = Shape(
            layers=len(blocks),
            sharing=sharing if self._has(blocks[0], ATTENTION) else 0,  # llama.cpp asks the first block
            experts=max(largest(config, key) for key in EXPERT_COUNTS),
            having=tuple(b.index for b in blocks if self._has(b, meant)) if meant in (ATTENTION, DOWN) else (),
        )
        has_output = any(_part(self._name(other.weight)) == "output" for other in model.structure.outside_sites)
        return type_in_mix(mix, part, site.block, site.in_features, shape, tied=not has_output)

    def _has(self, block: Block, part: str) -> bool:
        """Whether a block has what the rules of mixes call so."""
        return any(part_in_rules(_part(self._name(site.weight))) == part for site in block.sites)

    def approximation(self, scheme: QuantScheme) -> str | None:
        """What the format rounds, None when it is exact."""
        if ggml_type(scheme) != "Q4_1" or scheme.type is not None:
            return None
        return "Q4_1 stores zero point x scale as float16: each group is moved by up to 1 / 2048 of that product"

    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """One tensor of bytes, [out, bytes of a row], and of NVFP4 the number that all of it is multiplied by."""
        kind = held_as(scheme)
        row, name = site.in_features // kind.columns * kind.nbytes, self._name(site.weight)
        scale: list[TensorSpec] = [(_scale_of(name), "F32", (1,))] if kind.name == "NVFP4" else []
        return [(name, "U8", (site.out_features, row)), *scale]

    def plain_spec(self, info: TensorInfo) -> TensorSpec:
        """What becomes of a tensor that is not quantized: vectors are float32 in every GGUF file."""
        if self._in_own_names:
            return info.name, info.dtype, info.shape
        name, shape = self._name(info.name), _without_middle(info.shape)
        if self.number_in_stack(info.name) is not None and len(shape) == 1:  # a bias, one row for each expert
            return name, "F32", (1, *shape)
        return name, "F32" if len(shape) == 1 or self._is_wide(name) else info.dtype, shape

    def plain(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The tensor of `plain_spec`, in the same shape; rows in the order of the file."""
        if self._in_own_names:
            return name, tensor
        heads = self._heads(self._name(name))
        tensor = tensor if heads is None else tensor[_rotated_rows(len(tensor), heads)]
        tensor = tensor.reshape(_without_middle(tuple(tensor.shape)))
        if self._architecture.gains_less_one and name.endswith("norm.weight") and not name.endswith(WHOLE_GAIN):
            tensor = tensor.float() + 1
        if name.endswith(DECAY):
            tensor = -tensor.float().exp()
        is_bias = self.number_in_stack(name) is not None and tensor.ndim == 1
        name = self._name(name)
        tensor = tensor.float() if tensor.ndim == 1 or self._is_wide(name) else tensor
        return name, tensor[None] if is_bias else tensor

    def plain_specs(self, info: TensorInfo) -> list[TensorSpec]:
        """None of what llama.cpp's file of the language model does not have; two of what makes keys and values."""
        if self._in_own_names:
            return [self.plain_spec(info)]
        if self.leaves_out(info.name):
            return []
        if not COMPRESSED_KEYS.search(info.name):
            return [self.plain_spec(info)]
        heads, keys, values = self._key_sizes
        names = (self._name(COMPRESSED_KEYS.sub(part, info.name)) for part in (".k_b_proj.", ".v_b_proj."))
        shapes = ((heads * info.shape[1], keys), (heads * values, info.shape[1]))
        return [(name, info.dtype, shape) for name, shape in zip(names, shapes, strict=True)]

    def plains(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The tensors of `plain_specs`: of keys [heads x compressed, keys], of values [heads x values, compressed]."""
        if self._in_own_names or not (self.leaves_out(name) or COMPRESSED_KEYS.search(name)):
            return [self.plain(name, tensor)]
        if self.leaves_out(name):
            return []
        heads, keys, _ = self._key_sizes
        parts = tensor.view(heads, -1, tensor.shape[1])
        first = parts[:, :keys].transpose(1, 2).reshape(-1, keys).contiguous()
        second = parts[:, keys:].reshape(-1, tensor.shape[1]).contiguous()
        names = (self._name(COMPRESSED_KEYS.sub(part, name)) for part in (".k_b_proj.", ".v_b_proj."))
        return list(zip(names, (first, second), strict=True))

    @property
    def _key_sizes(self) -> tuple[int, int, int]:
        """Heads, and channels of a key that are not rotated and of a value, where both are made of compressed ones."""
        keys = ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
        heads, unrotated, values = (int(text_of(self.config)[key]) for key in keys)
        return heads, unrotated, values

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor is of a tower, or of a block that predicts further tokens: llama.cpp's file has none."""
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        beyond = number is not None and int(number[1]) >= int(text_of(self.config).get("num_hidden_layers") or 1 << 30)
        return beyond or name.startswith("mtp.") or tower_of(name) is not None

    def _is_wide(self, name: str) -> bool:
        """Whether a tensor is float32 in the file whatever it was: as llama.cpp reads it, or as the template has it."""
        known = None if self.frame is None else self.frame.by_name.get(name)
        return bool(WIDE.search(name)) if known is None else known.type == "F32"

    def number_in_stack(self, name: str) -> int | None:
        """The number of the expert, whose rows lie in the tensor of all experts of its block."""
        return None if self._in_own_names else expert_of(name)

    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensor of `tensor_specs`: blocks, uint8 [out, bytes of a row]."""
        name = self._name(site.weight)
        heads, unit = self._heads(name), quantized.super_scale
        order = None if heads is None else _rotated_rows(site.out_features, heads)
        scale = {_scale_of(name): 1 / unit.cpu()} if unit is not None and unit.ndim == 1 else {}
        return {name: encode_blocks(site, quantized, order), **scale}

    def by_rows(self, site: LinearSite, scheme: QuantScheme) -> bool:
        """Rows are apart, but where the file has those of a head in another order."""
        return self._heads(self._name(site.weight)) is None and held_as(scheme).name != "NVFP4"

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
        return name if self._in_own_names else gguf_name(name, self._architecture.name)

    @property
    def _architecture(self) -> Architecture:
        """The row of the model's architecture, with what a frame says of it; that of Llama where none is known."""
        row = architecture_of(self.config) or architectures()["llama"]
        if self.frame is None or self._in_own_names:
            return row
        said = self.frame
        return replace(row, name=said.architecture, rotated=said.rotated, gains_less_one=said.gains_less_one)

    def _heads(self, name: str) -> int | None:
        """Number of heads whose rows the file has in rotary order, None where rows are in the model's order."""
        part = name.split(".")[-2]
        if self._in_own_names or part not in ROTATED or not self._architecture.rotated:
            return None
        config = text_of(self.config)
        return int(config.get(ROTATED[part]) or config["num_attention_heads"])

    def make_layout(
        self,
        tensors: Sequence[OutputTensor],
        schemes: Mapping[LinearSite, QuantScheme],
        source: Checkpoint,
        shard: int,
        mix: str | None = None,
    ) -> Layout:
        """One file: metadata and tensor headers, then every tensor at a multiple of 32 bytes. mix: its name there."""
        import numpy as np

        types = {self._name(site.weight): held_as(scheme).name for site, scheme in schemes.items()}
        if self.frame is not None:
            layout = _framed_layout(self.frame, tensors, types, mix)
            return replace(layout, notes=self._left_out(source))
        factors = {name: np.array(values, "<f4") for name, values in self._factors.items()}
        own = [OutputTensor(name, "F32", values.shape, HEADER) for name, values in factors.items()]
        entries = [(t.name, types.get(t.name, t.dtype), self._shape(t), t.nbytes) for t in (*own, *tensors)]
        header, differences = gguf_header(source, entries, mix)
        # They depend on the config alone, so they are written with the header and belong to no unit of work.
        places = {}
        for tensor in own:
            places[tensor.name] = Place(tensor, FILE_NAME, len(header))
            header += factors[tensor.name].tobytes() + b"\0" * (-tensor.nbytes % ALIGNMENT)
        offset = len(header)
        for tensor in tensors:
            places[tensor.name] = Place(tensor, FILE_NAME, offset)
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        notes = (*differences, *rounded_bounds(self._whole), *self._left_out(source))
        return Layout(places, {FILE_NAME: header}, {FILE_NAME: offset}, notes)

    def _left_out(self, source: Checkpoint) -> tuple[str, ...]:
        """A sentence on the tensors that the file does not have; none where it has all."""
        names = [] if self._in_own_names else [name for name in source.tensors if self.leaves_out(name)]
        if not names:
            return ()
        more = f" and {len(names) - 1} more" if names[1:] else ""
        beside = "what sees or hears is for llama.cpp's own converter (--mmproj)"
        return (f"{names[0]}{more}: left out, the file holds the language model alone; {beside}",)

    @property
    def _whole(self) -> dict[str, Any]:
        """The config with all that its class has by itself; empty where there is no row for it."""
        return whole_config(self.config) if architecture_of(self.config) is not None else {}

    @property
    def _factors(self) -> dict[str, list[float]]:
        """Factors of the rotary frequencies by the name of their tensor."""
        row = self._architecture
        return rope_tensors(adjusted(row, self._whole), row.part) if self._whole else {}

    def _shape(self, tensor: OutputTensor) -> tuple[int, ...]:
        """The shape in the header: of all experts, or heads, of a block [experts, rows, ...]."""
        if SEVERAL.search(tensor.name) is None or len(tensor.shape) > 2:
            return tensor.shape
        config = text_of(self.config)
        keys = EXPERT_COUNTS if "_exps" in tensor.name else ("num_attention_heads",)
        count = next(int(config[key]) for key in keys if config.get(key))
        return (count, tensor.shape[0] // count, *tensor.shape[1:])

    def keeps_file(self, name: str) -> bool:
        """Whether a file beside the weights is carried over; config and tokenizer are inside the GGUF file."""
        return name.upper().startswith(KEPT_FILES)

    def check_complete(self, folder: Path, layout: Layout) -> None:
        """Its header was compared with the layout; there is no library to ask that reads a file by its header alone."""

    def quantization_config(self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None) -> None:
        """GGUF files have no config.json."""


def _framed_layout(frame: Frame, tensors: Sequence[OutputTensor], types: Mapping[str, str], mix: str | None) -> Layout:
    """The layout in a frame: tensors in its order. types: ggml's of those that are quantized, by name. mix: of them.

    What no model has comes first: it is written with the header. SourceError where frame and model do not fit.
    """
    from gguf import GGMLQuantizationType

    outputs = {tensor.name: tensor for tensor in tensors}
    _check_frame(frame, outputs)
    own, entries = [tensor for tensor in frame.tensors if tensor.name in frame.extras], []
    for tensor in frame.tensors:
        if tensor.name in outputs:
            kind = types.get(tensor.name) or (tensor.type if frame.own_names else outputs[tensor.name].dtype)
            number = tensor.number if kind == tensor.type else int(GGMLQuantizationType[kind])
            entries.append((replace(tensor, type=kind, number=number), outputs[tensor.name].nbytes))
    rounded = [(tensor.type, nbytes) for tensor, nbytes in entries if not types or tensor.name in types]
    of_file = None if frame.own_names and not types else file_type(rounded, mix)
    header = framed_header(frame, [*((tensor, len(frame.extras[tensor.name])) for tensor in own), *entries], of_file)
    places = {}
    for tensor in own:
        raw, output = frame.extras[tensor.name], OutputTensor(tensor.name, tensor.type, tensor.shape, HEADER)
        places[tensor.name] = Place(output, FILE_NAME, len(header))
        header += raw + b"\0" * (-len(raw) % frame.alignment)
    offset = len(header)
    for tensor, nbytes in entries:
        places[tensor.name] = Place(outputs[tensor.name], FILE_NAME, offset)
        offset += nbytes + -nbytes % frame.alignment
    return Layout(places, {FILE_NAME: header}, {FILE_NAME: offset})


def _check_frame(frame: Frame, outputs: Mapping[str, OutputTensor]) -> None:
    """SourceError for a tensor that only one of both has."""
    without = [name for name in outputs if name not in frame.by_name]
    beyond = [name for name in frame.by_name if name not in outputs and name not in frame.extras]
    if without or beyond:
        said = f"has no tensor {without[0]}" if without else f"has the tensor {beyond[0]}, which the model has not"
        raise SourceError(f"{frame.source} {said}", hint="name a template that was made of this very model")


def _without_middle(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[channels, width] of the kernel of a depthwise convolution, [channels, 1, width]; other shapes as they are."""
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def _part(name: str) -> str:
    """What a weight of a file is in its block ("attn_v"), or outside ("output")."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _scale_of(name: str) -> str:
    """The tensor beside a weight with which llama.cpp multiplies its product."""
    return f"{name.removesuffix('.weight')}.scale"


def _rotated_rows(rows: int, heads: int) -> torch.Tensor:
    """[out] the model's row at each place of the file: row i of a head's first half, then row i of its second."""
    import torch

    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
