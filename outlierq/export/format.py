"""`Format`: what every on-disk format is, with defaults. A new one is a class in a file of this folder, and its reader.

The class registers itself by its name, as methods do; its reader registers itself in `load/packed` by the same name
(`load/packed/reading.py`), and shares no code with it. Which clients load it is a row of `data/clients.json`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from outlierq.core.errors import OutputError
from outlierq.core.model import Checkpoint, LinearSite, Piece, StudiedModel, TensorInfo
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.scheme import CacheScheme, QuantScheme
from outlierq.export.clients import Mixture, client_facts
from outlierq.export.layout import Layout, OutputTensor, make_layout
from outlierq.export.writer import check_complete
from outlierq.registry import FormatLimits, format_limits

if TYPE_CHECKING:
    import torch

TensorSpec = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape
Sites = Sequence[tuple[LinearSite, QuantScheme | None]]  # every linear with its scheme, None where it is kept


@dataclass(frozen=True)
class Format(FormatLimits, ABC):
    """A format for one model. config: the content of its config.json, which no format can be made without.

    What needs no model is asked of the class. Defaults are those of a folder of safetensors.

    container: how its files are read (`load.packed.reading.HEADERS`). copies_rows: a tensor that is not quantized is
    written under its name as it is, so that a large one may be copied some rows at a time. no_new_biases: why it holds
    no biases but the source's, "" where it does. holds_codes: whether codes can be told from what it writes. library:
    that a model card names. stacks_experts: the experts of a block are in one tensor, whatever becomes of them.
    joins_experts: rows of several linears are in one tensor (`stacked`).
    """

    config: Mapping[str, Any]

    container: ClassVar[str] = "safetensors"
    copies_rows: ClassVar[bool] = True
    no_new_biases: ClassVar[str] = ""
    holds_codes: ClassVar[bool] = True
    stacks_experts: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    joins_experts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """OutlierqError where a library that the format needs is not installed."""
        return

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """The format for the model of a checkpoint."""
        return cls(checkpoint.config)

    @abstractmethod
    def obstacle(self, site: LinearSite, scheme: QuantScheme) -> str | None:
        """Why this format cannot hold the site, or None when it can."""

    @abstractmethod
    def tensor_specs(self, site: LinearSite, scheme: QuantScheme) -> list[TensorSpec]:
        """Every tensor that replaces the site's weight."""

    @abstractmethod
    def encode(self, site: LinearSite, quantized: QuantTensor) -> dict[str, torch.Tensor]:
        """The tensors of `tensor_specs` for a weight [out, in], or the same rows of them where `by_rows` allows it."""

    @abstractmethod
    def quantization_config(
        self, sites: Sites, *, kept: Sequence[str] = (), cache: CacheScheme | None = None
    ) -> dict[str, Any] | None:
        """The `quantization_config` of config.json; None for a file without one.

        kept: every module that is stored plain (`declared.kept_modules`). cache: of the KV cache, None for 16 bits.
        """

    @classmethod
    def dense_key(cls, schemes: Collection[QuantScheme]) -> str | None:
        """The key of its config by which transformers decodes weights while it loads them, None when there is none."""
        return None

    @classmethod
    def conflict(cls, schemes: Collection[QuantScheme]) -> str | None:
        """Why schemes that it can hold cannot stand in one checkpoint, or None when they can."""
        return None

    @classmethod
    def clients(cls, schemes: Collection[QuantScheme]) -> list[str]:
        """Which programs load it, one line each."""
        return client_facts(cls.name, schemes)

    @classmethod
    def expert_clients(cls, schemes: Collection[QuantScheme | None], experts: Mixture) -> list[str]:
        """What clients do with the experts of a mixture. schemes: of all their linears, None for those in 16 bits."""
        return [f"experts: no client was tried with {cls.name}; compressed-tensors loads"]

    def instead(self, site: LinearSite, scheme: QuantScheme) -> tuple[QuantScheme, str] | None:
        """The scheme that it can hold in place of one that it cannot, and why; None where there is no other."""
        return None

    def type_in_mix(self, mix: str, site: LinearSite, model: StudiedModel) -> str:
        """The type of GGUF that a mix gives a linear, or a table of embeddings."""
        raise OutputError(f"{self.name} has no mixes of types")

    def approximation(self, scheme: QuantScheme) -> str | None:
        """What of a scheme it rounds, None when it is exact."""
        return None

    def by_rows(self, site: LinearSite, scheme: QuantScheme) -> bool:
        """Whether some rows of a linear can be encoded without the others."""
        return False

    def stacked(self, name: str) -> Piece | None:
        """Where the rows of a linear, or a tensor that is not quantized, lie in one that it shares with others; None
        where it has tensors of its own. What is shared is written expert by expert.
        """
        return None

    def role(self, name: str) -> str:
        """What one of a linear's tensors is of it: the last part of its name."""
        return name.rpartition(".")[2]

    def plain_spec(self, info: TensorInfo) -> TensorSpec:
        """What becomes of a tensor that is not quantized."""
        return info.name, info.dtype, info.shape

    def plain_specs(self, info: TensorInfo) -> list[TensorSpec]:
        """The same where it becomes several tensors, or none."""
        return [self.plain_spec(info)]

    def plains(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The tensors of `plain_specs`."""
        return [self.plain(name, tensor)]

    def plain(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """The name and the tensor of `plain_spec`, in the same shape."""
        return name, tensor

    def number_in_stack(self, name: str) -> int | None:
        """Of a tensor that is written into one with others of its shape: its number among them. None: it is alone."""
        return None

    def row_order(self, site: LinearSite) -> dict[str, torch.Tensor]:
        """What a decoder must know beside the tensors of `tensor_specs`, by role."""
        return {}

    def make_layout(
        self,
        tensors: Sequence[OutputTensor],
        schemes: Mapping[LinearSite, QuantScheme],
        source: Checkpoint,
        shard: int,
        mix: str | None = None,
    ) -> Layout:
        """Where every tensor lies. schemes: of the linears that are quantized. shard: most bytes of a file.

        mix: of types of GGUF, where the recipe names one.
        """
        return make_layout(tensors, shard)

    def keeps_file(self, name: str) -> bool:
        """Whether a file beside the weights is carried over, and `config.json` written."""
        return True

    def check_complete(self, folder: Path, layout: Layout) -> None:
        """Read the finished files with a library that is not ours. OutputError when they differ from the layout."""
        check_complete(folder, layout)


def format_type(name: str) -> type[Format]:
    """The format called `name`, to be asked what needs no model, or to be made with a model's config; RecipeError."""
    limits = format_limits(name)
    if not issubclass(limits, Format):
        raise OutputError(f"the format {name} says what it holds, but cannot write", hint="derive it from Format")
    return limits
