"""The checkpoint and the structure found in it: tensors, blocks, linear sites, shared inputs, folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorInfo:
    """Header of one stored tensor. dtype is a safetensors name: "BF16", "F16", "F32", "I32", ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class CarriedFile:
    """A file that goes unchanged from the source to the output (tokenizer, chat template, licence, ...)."""

    name: str
    content: bytes | None = None
    path: str | None = None

    def read(self) -> bytes:
        """The bytes of the file."""
        if self.content is not None:
            return self.content
        assert self.path is not None, f"{self.name} has neither content nor path"
        with open(self.path, "rb") as file:
            return file.read()


class Checkpoint(Protocol):
    """A source of weights: headers first, weights when `read` is called.

    source: what the user wrote. kind: "huggingface" or "gguf". config: the content of config.json.
    dtype: dtype in which weights are meant to be used, a torch dtype name ("bfloat16").
    tensors: headers by Hugging Face tensor name (a GGUF file is presented under those names, too).
    files: everything else that belongs to the checkpoint. fingerprint: sha256 hex of headers, sizes and a sample of
    every tensor's bytes.
    """

    source: str
    kind: str
    config: dict[str, Any]
    dtype: str
    tensors: Mapping[str, TensorInfo]
    files: tuple[CarriedFile, ...]
    fingerprint: str

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored (GGUF: dequantized to `dtype`). Shapes are Hugging Face's."""
        ...


@dataclass(frozen=True)
class LinearSite:
    """One linear weight.

    module: full module name ("model.layers.0.self_attn.q_proj"). weight, bias: tensor names in the checkpoint
    (bias None when there is none). transposed: the checkpoint stores [in, out] (GPT-2's Conv1D).
    out_features, in_features: of the logical [out, in] weight. block: index of its block, None outside of all blocks.
    kind: class name of the module ("Linear", "Conv1D"), or "Router" for what weighs experts: that is never quantized.
    expert: full name of the expert that it is a part of ("model.layers.0.mlp.experts.3"), None outside of mixtures.
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
    def sites(self) -> tuple[LinearSite, ...]:
        """Every linear site, blocks first."""
        return tuple(s for b in self.blocks for s in b.sites) + self.outside_sites


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
