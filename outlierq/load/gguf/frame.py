"""A GGUF file as it is: under its own names, without a model class, for a result in the same frame.

Needs nothing of transformers, so that it works for every architecture that llama.cpp has. Of a linear only its matrix
is known: what has no name of a weight that llama.cpp multiplies with is carried byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from outlierq.core.errors import SourceError
from outlierq.core.model import (
    Block,
    CarriedFile,
    Checkpoint,
    Frame,
    FrameTensor,
    LinearSite,
    Structure,
    StudiedModel,
    TensorInfo,
)
from outlierq.load.gguf.file import (
    SUPPORTED,
    GgufHeader,
    GgufTensor,
    check_decodable,
    dequantized,
    dequantized_rows,
    head_bytes,
    raw_rows,
)
from outlierq.load.gguf.split import COUNT, NUMBER, TENSORS, read_gguf
from outlierq.load.source.fingerprint import fingerprint
from outlierq.load.source.shards import lookup, sample, stored_digest, torch_dtype
from outlierq.load.source.unchanged import stamps_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PLAIN = ("F32", "F16", "BF16")
BLOCK = re.compile(r"(?P<list>blk|enc\.blk|dec\.blk)\.(?P<number>\d+)\.")
HEAD, EMBEDDING, FACTORS = "output", "token_embd", "rope_f"
# Matrices that llama.cpp keeps: routers, gains, kernels of convolutions, small tables and those that are looked up.
KEPT = re.compile(
    r"_norm\.|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|position_embd|token_types|conv1d|convnext"
    r"|shortconv\.conv\.|indexer\.|time_mix_(first|decay|lerp|[wvag]\d)|attn_rel_b|rope_|\bhc_|token_embd|posnet|\bcls"
)
# Keys of the metadata behind the name of the architecture, by what configs of transformers call them.
SIZES = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
    "max_position_embeddings": "context_length",
}


class FramedCheckpoint(Checkpoint):
    """A GGUF file under its own names. Experts in one tensor are one matrix [experts x out, in].

    decoded: packed tensors that are given as float32 numbers; all others are given as the bytes that are stored.
    """

    kind, reads_rows = "gguf", True

    def __init__(self, path: Path, *, source: str | None = None, decoded: Collection[str] = ()):
        self.path, self.source, self.decoded = path, source or str(path), frozenset(decoded)
        self._header = read_gguf(path)
        self.stamps = stamps_of(self._header.parts)
        self.bytes_read: dict[str, str] = {}
        self.dtype = _dtype(self._header)
        self.config: dict[str, Any] = _config(self._header)
        self.tensors: dict[str, TensorInfo] = {t.name: self._info(t) for t in self._header.tensors.values()}
        self.frame = frame_of(self._header, own_names=True)

    def decoding(self, names: Collection[str]) -> FramedCheckpoint:
        """The same file with other tensors decoded. SourceError for one of a type that is not read here."""
        for name in names:
            check_decodable(lookup(self._header.tensors, name))
        return FramedCheckpoint(self.path, source=self.source, decoded=names)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor in the file, row-major."""
        return {tensor.name: tensor.shape for tensor in self._header.tensors.values()}

    def studied(self) -> StudiedModel:
        """Blocks and matrices by their names alone."""
        return self._model

    @cached_property
    def _model(self) -> StudiedModel:
        """The same, made once."""
        return _studied(self)

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """None: everything is in the frame."""
        return ()

    @property
    def packed(self) -> list[str]:
        """Names of the tensors whose ggml type is a quantized one."""
        return [tensor.name for tensor in self._header.tensors.values() if tensor.type not in PLAIN]

    @property
    def decodable(self) -> list[str]:
        """Those of them whose blocks are read here."""
        return [name for name in self.packed if self._header.tensors[name].type in SUPPORTED]

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 hex, see `outlierq.load.source.fingerprint`."""
        infos = {tensor.name: self._as_stored(tensor) for tensor in self._header.tensors.values()}
        return fingerprint(head_bytes(self._header), infos, self._sample)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the shape and dtype of its header."""
        tensor, info = lookup(self._header.tensors, name), self.tensors[name]
        if name in self.decoded:
            return dequantized(tensor, torch_dtype("F32"), self.bytes_read).reshape(info.shape)
        return self._whole(tensor).view(torch_dtype(info.dtype)).reshape(info.shape)

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...] each."""
        tensor, info = lookup(self._header.tensors, name), self.tensors[name]
        if name in self.decoded:
            return dequantized_rows(tensor, count, self.bytes_read)
        dtype, shape = torch_dtype(info.dtype), info.shape[1:]
        return (raw.view(dtype).view(-1, *shape) for raw in raw_rows(tensor, count, self.bytes_read))

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of the tensor, [len(rows), ...], in the given order."""
        return self.read(name)[list(rows)]

    def digest(self, name: str) -> str:
        """XXH3-128 of the bytes of a tensor as they are now, as hex."""
        tensor = lookup(self._header.tensors, name)
        return stored_digest(name, tensor.path, tensor.start, tensor.nbytes)

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in the file."""
        return lookup(self._header.tensors, name).nbytes

    def making_bytes(self, name: str) -> int:
        """The stored bytes of a tensor that is decoded."""
        return self.stored_bytes(name) if name in self.decoded else 0

    def _whole(self, tensor: GgufTensor) -> torch.Tensor:
        """All bytes of a tensor."""
        import torch

        rows = prod(tensor.shape[:-1]) if tensor.row_bytes else 1
        raw = list(raw_rows(tensor, max(1, rows), self.bytes_read))
        return raw[0] if raw else torch.empty(0, dtype=torch.uint8)

    def _info(self, tensor: GgufTensor) -> TensorInfo:
        """The header of a tensor as it is given."""
        if tensor.name not in self.decoded:
            return self._as_stored(tensor)
        shape = _matrix(tensor.shape)
        return TensorInfo(tensor.name, "F32", shape, 4 * prod(shape))

    def _as_stored(self, tensor: GgufTensor) -> TensorInfo:
        """The header of a tensor as it is stored; a packed one is bytes [rows, bytes of a row]."""
        if tensor.type in PLAIN:
            return TensorInfo(tensor.name, tensor.type, _matrix(tensor.shape), tensor.nbytes)
        width = tensor.row_bytes or tensor.nbytes
        return TensorInfo(tensor.name, "U8", (tensor.nbytes // width if width else 0, width), tensor.nbytes)

    def _sample(self, names: list[str], length: int) -> Iterator[tuple[str, bytes]]:
        """First bytes of each tensor as the file stores it."""
        tensors = self._header.tensors
        return sample(((n, tensors[n].path, tensors[n].start, tensors[n].nbytes) for n in names), length)


def frame_of(header: GgufHeader, *, own_names: bool) -> Frame:
    """The frame of a file, of all parts of a split one. own_names: see `Frame`."""
    keys = {}
    with header.path.open("rb") as file:
        for name, (start, end) in header.keys.items():
            if name not in (NUMBER, COUNT, TENSORS):
                file.seek(start)
                keys[name] = file.read(end - start)
    tensors = tuple(FrameTensor(t.name, t.shape, t.type, t.number) for t in header.tensors.values())
    factors = [] if own_names else [t for t in header.tensors.values() if t.name.startswith(FACTORS)]
    extras = {tensor.name: b"".join(raw.numpy().tobytes() for raw in raw_rows(tensor, 1)) for tensor in factors}
    architecture = str(header.fields.get("general.architecture"))
    return Frame(header.path.name, keys, header.version, header.alignment, tensors, own_names, architecture, extras)


def _studied(checkpoint: FramedCheckpoint) -> StudiedModel:
    """The blocks and the matrices that llama.cpp multiplies with, by their names alone. SourceError without a block."""
    names = list(checkpoint.tensors)
    modules = _module_names(checkpoint)
    inside: dict[str, list[str]] = {}
    for name in names:
        if match := BLOCK.match(name):
            inside.setdefault(match[0], []).append(name)
    if not inside:
        raise SourceError(f"{checkpoint.source} has no blocks (blk.0 and so on); which every model has")
    blocks = tuple(
        Block(index, prefix.removesuffix("."), tuple(_sites(checkpoint, tensors, modules, index)), tuple(tensors))
        for index, (prefix, tensors) in enumerate(inside.items())
    )
    outside = [name for name in names if not BLOCK.match(name)]
    sites = tuple(_sites(checkpoint, outside, modules, None))
    covered = {site.weight for site in sites}
    structure = Structure(blocks, sites, tuple(name for name in outside if name not in covered))
    return StudiedModel(checkpoint, _skeleton(checkpoint), structure, {name: name for name in names})


def _sites(
    checkpoint: FramedCheckpoint, names: list[str], modules: Mapping[str, str], block: int | None
) -> Iterator[LinearSite]:
    """The linears among some tensors."""
    for name in names:
        shape = checkpoint.shapes[name]
        if name.endswith(".weight") and len(shape) in (2, 3) and not KEPT.search(name):
            rows, columns = _matrix(shape)
            yield LinearSite(modules[name], name, None, rows, columns, block)


def _module_names(checkpoint: FramedCheckpoint) -> dict[str, str]:
    """What each matrix is called in recipes: as in Hugging Face models where gguf knows the name: so patterns fit."""
    known = _known_names(checkpoint.config["model_type"])
    named = {}
    for name in checkpoint.tensors:
        bare, block = name.removesuffix(".weight"), BLOCK.match(name)
        theirs = known.get(BLOCK.sub("blk.0.", bare)) if block else None
        named[name] = theirs.replace(".0.", f".{block['number']}.", 1) if theirs and block else bare
    return named | {f"{HEAD}.weight": "lm_head"}


def _known_names(architecture: str) -> dict[str, str]:
    """Name in the first block -> what transformers' models of that architecture call it; the last parts end in _proj
    where there is such a name."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    known: dict[str, str] = {}
    for theirs, (_, ours) in get_tensor_name_map(arch, 1).mapping.items() if arch is not None else ():
        if theirs.startswith("model.layers.0.") and not known.get(ours, "").endswith("_proj"):
            known[ours] = theirs
    return known


def _skeleton(checkpoint: FramedCheckpoint) -> PreTrainedModel:
    """Stands for the model class: sizes, and the table of embeddings on the meta device."""
    import torch
    from transformers import PreTrainedConfig

    model: Any = torch.nn.Module()
    model.config = PreTrainedConfig(**{key: checkpoint.config[key] for key in SIZES if key in checkpoint.config})
    table = checkpoint.shapes.get(f"{EMBEDDING}.weight", (1, 1))
    embedding = torch.nn.Embedding(*table, device="meta")
    model.add_module(EMBEDDING, embedding)
    model.get_input_embeddings = lambda: embedding
    model.get_expanded_tied_weights_keys = lambda **_: {}
    return cast("PreTrainedModel", model)


def _dtype(header: GgufHeader) -> str:
    """The dtype of the matrices; bfloat16 where they are packed."""
    types = {tensor.type for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if types and types <= {"F16", "F32"}:
        return "float32" if "F32" in types and "F16" not in types else "float16"
    return "bfloat16"


def _config(header: GgufHeader) -> dict[str, Any]:
    """What is known of the model's sizes. SourceError where the file does not say its architecture."""
    architecture = header.fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise SourceError(f"{header.path.name} does not say its architecture (general.architecture)")
    sizes = {key: header.fields.get(f"{architecture}.{name}") for key, name in SIZES.items()}
    sizes = {key: size for key, size in sizes.items() if isinstance(size, int)}
    return {"model_type": architecture, "architectures": [architecture], **sizes}


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of all rows of a tensor below each other."""
    return shape if len(shape) < 2 else (prod(shape[:-1]), shape[-1])
