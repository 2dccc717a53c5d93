"""The checkpoint and the structure found in it: tensors, blocks, linear sites, shared inputs, folds."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.scheme import QuantScheme

FLOAT32, EMBEDDING = "Float32", "Embedding"
# Where a module of the skeleton that has no weight of its own keeps the pieces which it is made of: parameter -> name
# of each piece -> the module that holds it.
MADE_OF = "_made_of"
# Where a module of the skeleton keeps the names of parameters and buffers that its class has in float32 in any dtype.
IN_FLOAT32 = "_in_float32"
# What configs, and modules of experts, call the number of experts in a block.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# And the number of experts chosen for a token.
TOP_K = ("num_experts_per_tok", "moe_k", "top_k_experts")

# Keys of a config that change nothing of what the model computes: how it was trained, stored or called.
HARMLESS_KEYS = re.compile(
    r"_?name_or_path|.*transformers_version|(torch_)?dtype|use_cache|.*attn_implementation.*|_commit_hash|.*dropout.*"
    r"|.*dropped?|initializer_\w+|.*init_range|.*init_std|pretraining_tp|quantization_config|output_\w+|return_dict|id2label"
    r"|label2id|problem_type|.*aux_loss.*|auto_map|is_encoder_decoder|chunk_size_feed_forward|tokenizer_class|.*pdrop"
    r"|finetuning_task|task_specific_params|torchscript|summary_\w+|architectures|unsloth\w*|use_bfloat16|experts_implementation"
)


def sizes(config: PreTrainedConfig, key: str) -> list[int]:
    """The different numbers that a config, or each of its layers, has for a key, in order; empty without the key.

    Where layers differ (the head size of Gemma 4), transformers refuses to say one for the whole model.
    """
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,)
    values = [getattr(layer, key, None) for layer in layers]
    return list(dict.fromkeys(value for value in values if isinstance(value, int)))


def largest(config: PreTrainedConfig, key: str, default: int = 0) -> int:
    """The largest of `sizes`; `default` when there is none."""
    return max(sizes(config, key), default=default)


@dataclass(frozen=True)
class TensorInfo:
    """Header of one stored tensor. dtype is a safetensors name: "BF16", "F16", "F32", "I32", ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class FrameTensor:
    """One tensor of a frame. shape: row-major. type: ggml's name. number: ggml's number of the type."""

    name: str
    shape: tuple[int, ...]
    type: str
    number: int


@dataclass(frozen=True)
class Frame:
    """Everything of a GGUF file but the bytes of its tensors. source: the file, as people call it.

    keys: each key with its value, as bytes of the file, without those of a split. version: of the format. alignment:
    of tensors, in bytes. tensors: in file order. own_names: the tensors of the checkpoint have the names of the file.
    architecture: llama.cpp's. extras: bytes of the tensors that no model has, factors of the rotary embedding. rotated,
    gains_less_one: what was done to the model's tensors (`export.gguf.architectures.Architecture`).
    """

    source: str
    keys: Mapping[str, bytes]
    version: int
    alignment: int
    tensors: tuple[FrameTensor, ...]
    own_names: bool
    architecture: str = ""
    extras: Mapping[str, bytes] = field(default_factory=dict)
    rotated: bool = False
    gains_less_one: bool = False

    @cached_property
    def by_name(self) -> Mapping[str, FrameTensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}


# Bytes; a vocabulary has some 30 MB.
LARGE_FILE = 1 << 24


@dataclass(frozen=True)
class CarriedFile:
    """A file that goes unchanged from the source to the output (tokenizer, chat template, licence, ...)."""

    name: str
    content: bytes | None = None
    path: str | None = None

    def held(self) -> bytes | Path:
        """The bytes of the file, or of a large one its path: it is copied piece by piece."""
        return Path(self.path) if self.path and os.path.getsize(self.path) > LARGE_FILE else self.read()

    def read(self) -> bytes:
        """The bytes of the file."""
        if self.content is not None:
            return self.content
        assert self.path is not None, f"{self.name} has neither content nor path"
        with open(self.path, "rb") as file:
            return file.read()


@dataclass(frozen=True)
class StoredLinear:
    """How one quantized weight is stored. shape: (out, in). members: stored tensor names by role.

    symmetric: whether the config says that there are no zero points.
    """

    shape: tuple[int, int]
    members: Mapping[str, str]
    symmetric: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Piece:
    """A part of one expert in a fused tensor. module: the name before the expert's number.

    rows: which rows of the expert's matrix [out, in], or entries of its bias. transposed: it is stored as [in, out].
    whole: the shape of the fused tensor.
    """

    tensor: str
    module: str
    expert: int
    rows: slice
    transposed: bool
    whole: tuple[int, ...]

    def of(self, fused: torch.Tensor) -> torch.Tensor:
        """The part as a view of what the fused tensor holds of the expert, a matrix or a vector."""
        return (fused.T if self.transposed else fused)[self.rows]

    def shape(self, fused: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part, when the fused tensor has this shape."""
        rows, *columns = reversed(fused[1:]) if self.transposed else fused[1:]
        return (len(range(*self.rows.indices(rows))), *columns)


class TensorSource(ABC):
    """Where tensors come from. dtype: torch dtype name in which they are meant to be used ("bfloat16").

    tensors: headers by name; empty where no size is told (random weights, for a look at a model).
    """

    dtype: str
    tensors: Mapping[str, TensorInfo] = MappingProxyType({})

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the shape of its header."""

    def read_many(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Several tensors by name, each in the shape of its header; a source of many files opens each of them once."""
        return {name: self.read(name) for name in names}


class Checkpoint(TensorSource):
    """A source of weights: headers first, weights when they are read. What a kind of source lacks keeps its default.

    source: what the user wrote. kind: "huggingface" or "gguf". config: the content of config.json.
    tensors: headers by Hugging Face tensor name (a GGUF file is presented under those names, too).
    path: the folder, or the GGUF file. revision: commit on the Hub, None where there is none.
    linears: how each weight is stored that `quantized` can be asked for, by its name.
    stamps: weight file -> (inode, bytes, nanoseconds of the last change) when it was opened; no others are watched.
    bytes_read: XXH3-128 (hex) of the stored bytes of every tensor that was read whole, by its name in the file.
    made_of: the same of the checkpoint that earlier decisions about this one were made on, such as which experts stay.
    reads_rows: whether `read_rows` and `read_some_rows` read no more of a file than what they give.
    most_threads: how many threads may read at a time, None for any number.
    trust_remote_code: whether Python code that comes with the checkpoint may run.
    frame: of a GGUF file that results are written into, None where there is none.
    """

    source: str
    kind: str
    config: dict[str, Any]
    path: Path
    revision: str | None = None
    linears: Mapping[str, StoredLinear] = MappingProxyType({})
    stamps: Mapping[Path, tuple[int, int, int]] = MappingProxyType({})
    bytes_read: Mapping[str, str] = MappingProxyType({})
    made_of: Mapping[str, str] = MappingProxyType({})
    reads_rows: bool = False
    most_threads: int | None = None
    trust_remote_code: bool = False
    frame: Frame | None = None

    @property
    @abstractmethod
    def files(self) -> tuple[CarriedFile, ...]:
        """Everything else that belongs to the checkpoint."""

    @property
    def left_behind(self) -> tuple[str, ...]:
        """Names of what lies beside the weights and does not travel with them."""
        return ()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Sha256 hex of headers, sizes and a sample of every tensor's bytes."""

    @property
    def packed(self) -> Collection[str]:
        """Names of the weights that are stored quantized, also of those whose codes cannot be asked for."""
        return self.linears.keys()

    @property
    def weight_files(self) -> Sequence[Path]:
        """The files that it pays to read before they are needed, in the order of the tensors."""
        return ()

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest by name of every weight file that does not lie at `path`, as the Hub lists it."""
        return {}

    def read_rows(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """The tensor `count` rows at a time, [count, ...] each; a piece is valid until the next is asked for."""
        tensor = self.read(name)
        return (tensor[row : row + count] for row in range(0, len(tensor), count))

    def read_some_rows(self, name: str, rows: Iterable[int]) -> torch.Tensor:
        """Some rows of the tensor, [len(rows), ...], in the given order."""
        return self.read(name)[list(rows)]

    def stored_parts(self, name: str) -> Sequence[TensorInfo]:
        """What a file stores of a tensor: itself; of one that is stored compressed its codes, then its other parts."""
        return [self.tensors[name]]

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as the file stores it, with the scales of one that is stored compressed."""
        return sum(part.nbytes for part in self.stored_parts(name))

    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself: nothing where it is stored as it is."""
        return 0

    def quantized(self, name: str) -> QuantTensor:
        """Codes [out, in], scales and zero points of a weight in `linears`. SourceError when they cannot be told."""
        raise SourceError(f"{name} of {self.source} is not stored as codes in groups of columns")

    def code_scheme(self, name: str) -> QuantScheme | None:
        """The scheme of what `quantized` gives, from headers alone; None where they do not tell it."""
        return None

    def piece(self, name: str) -> Piece | None:
        """Where a tensor lies in one of all experts of the source; None for a tensor of its own."""
        return None

    def install(self, model: torch.nn.Module, names: Mapping[str, str]) -> None:
        """Let a model with the weights of `read` compute what the checkpoint means: rounded inputs, a rounded cache.

        names: parameter -> tensor. A plain checkpoint means no more than its weights.
        """

    def digest(self, name: str) -> str:
        """XXH3-128 of a tensor's stored bytes as they are now, as hex; by a name of `bytes_read`."""
        raise KeyError(name)

    def studied(self) -> StudiedModel | None:
        """The model that a source without a class describes by itself; None where transformers has a class for it."""
        return None

    def make_room(self, structure: Structure, fetching: Callable[[int, int, str], None], *, together: bool) -> None:
        """Tell a source whose weight files come and go which blocks belong together; nothing for others.

        fetching: is told of every file that is fetched: how many were before, of how many, and its name. together:
        several blocks are worked on at a time.
        """

    def drop_shards(self) -> None:
        """Remove the weight files of such a source, which hardly needs them any more; nothing for others."""


class DerivedCheckpoint(Checkpoint):
    """A checkpoint on top of another, `original`; what a subclass does not say of itself is what the original says.

    `config` and `tensors` are to be set by the subclass.
    """

    def __init__(self, original: Checkpoint):
        self.original = original
        self.source, self.kind, self.dtype = original.source, original.kind, original.dtype
        self.path, self.revision = original.path, original.revision
        self.stamps, self.most_threads = original.stamps, original.most_threads
        self.trust_remote_code = original.trust_remote_code
        self.bytes_read, self.made_of = original.bytes_read, original.made_of
        self.frame = original.frame

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """The files of the original."""
        return self.original.files

    @property
    def left_behind(self) -> tuple[str, ...]:
        """What the original leaves behind."""
        return self.original.left_behind

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the original."""
        return self.original.fingerprint

    def piece(self, name: str) -> Piece | None:
        """Where the original has it."""
        return self.original.piece(name)

    def digest(self, name: str) -> str:
        """The digest of the original's tensor."""
        return self.original.digest(name)

    @property
    def digests(self) -> Mapping[str, str]:
        """The digests of the original's weight files."""
        return self.original.digests

    def make_room(self, structure: Structure, fetching: Callable[[int, int, str], None], *, together: bool) -> None:
        """Tell the original."""
        self.original.make_room(structure, fetching, together=together)

    def drop_shards(self) -> None:
        """Remove those of the original."""
        self.original.drop_shards()


@dataclass(frozen=True)
class LinearSite:
    """One linear weight.

    module: full module name ("model.layers.0.self_attn.q_proj"). weight, bias: tensor names in the checkpoint
    (bias None when there is none). transposed: the checkpoint stores [in, out] (GPT-2's Conv1D).
    out_features, in_features: of the logical [out, in] weight. block: index of its block, None outside of all blocks.
    kind: "Linear" for what computes as one, else the module's class name ("Conv1D"); "Router" for what weighs experts
    and FLOAT32 for what its class computes in float32: those are never quantized; EMBEDDING for a table of embeddings,
    [tokens, channels], which is a site only where a recipe has a type for it.
    expert: full name of the expert that it is a part of ("model.layers.0.mlp.experts.3"), None outside of mixtures.
    tower: name of the part beside the text decoder that it belongs to ("model.vision_tower"), None in the decoder.
    """

    module: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int
    block: int | None
    kind: str = "Linear"
    transposed: bool = False
    expert: str | None = None
    tower: str | None = None

    @property
    def known_bias(self) -> str:
        """The name of the bias, of a site that is known to have one, as every site of a shifted input."""
        assert self.bias is not None, f"{self.module} has no bias"
        return self.bias


@dataclass(frozen=True)
class Block:
    """One decoder block. name: module name ("model.layers.0"). tensors: every checkpoint tensor name inside it."""

    index: int
    name: str
    sites: tuple[LinearSite, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """What a model consists of: its blocks, the linear sites outside of them, and all other tensors.

    tied: pairs (tensor name absent from the checkpoint, name of the stored tensor it shares), e.g. a tied lm_head.
    """

    blocks: tuple[Block, ...]
    outside_sites: tuple[LinearSite, ...]
    outside_tensors: tuple[str, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @property
    def outside_once(self) -> tuple[str, ...]:
        """The other tensors, without those that are stored a second time with the values that they share."""
        twice = {slot for slot, _ in self.tied}
        return tuple(name for name in self.outside_tensors if name not in twice)

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the parts beside the text decoder: text alone runs through none of them."""
        return tuple(dict.fromkeys(site.tower for site in self.outside_sites if site.tower is not None))

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """Every linear site, blocks first."""
        return tuple(s for b in self.blocks for s in b.sites) + self.outside_sites


@dataclass(frozen=True)
class StudiedModel:
    """A checkpoint with what was found in it (`outlierq.load.study`).

    skeleton: its model class, parameters on the meta device. names: parameter of the class -> stored tensor.
    """

    checkpoint: Checkpoint
    skeleton: PreTrainedModel
    structure: Structure
    names: Mapping[str, str]


@dataclass(frozen=True)
class Fold:
    """A producer that may absorb the inverse of a per-channel scale on the input of a group. Proved, not listed.

    kind: "norm" (gain w -> w / s), "offset-norm" (gain stored as w - 1: w -> (1 + w) / s - 1), or "linear"
    (output rows / s, and the bias with them). weight, bias: tensor names of the producer.
    index: [K] tuple, producer channel (row) that feeds each input channel of the group; channels that share a producer
    channel must share their scale. transposed: the producer's weight is stored [in, out].
    shift: a shift of the input can be absorbed, too: the producer's bias takes it off, the bias of every site of the
    group puts it back. shift_note: how that was proved, or why not.
    """

    kind: str
    weight: str
    bias: str | None
    index: tuple[int, ...]
    transposed: bool = False
    shift: bool = False
    shift_note: str = ""


@dataclass(frozen=True)
class InputGroup:
    """The sites of one block that read the same input tensor, and the fold that was admitted for it (or None).

    name: module name of the first site; statistics are keyed by it.
    fold_note: one sentence, why the fold was admitted or rejected, for the report.
    routed: only the tokens that a router sends to an expert reach the sites; there may be none.
    parts: the sites of each expert among the group's, as routed groups: they get only some of the tokens that the group
    gets, and have statistics of their own beside those of the group.
    """

    name: str
    sites: tuple[LinearSite, ...]
    fold: Fold | None = None
    fold_note: str = ""
    routed: bool = False
    parts: tuple[InputGroup, ...] = ()

    @property
    def admitted(self) -> Fold:
        """The fold, of a group that is known to have one."""
        assert self.fold is not None, f"{self.name} has no fold"
        return self.fold


def as_matrix(site: LinearSite, stored: torch.Tensor) -> torch.Tensor:
    """The logical [out, in] weight of a stored tensor (Conv1D stores [in, out])."""
    return stored.T.contiguous() if site.transposed else stored


def from_matrix(site: LinearSite, matrix: torch.Tensor) -> torch.Tensor:
    """The stored tensor of a logical [out, in] weight: the inverse of `as_matrix`."""
    return matrix.T.contiguous() if site.transposed else matrix
