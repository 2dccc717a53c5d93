"""A checkpoint with changed tensors on top of the checkpoint: each is computed when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outlierq.core.dtypes import WEIGHT_DTYPES
from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.model import CarriedFile, Checkpoint, TensorInfo
from outlierq.pipeline.remodel.derived import RemodelledCheckpoint

if TYPE_CHECKING:
    import torch

    from outlierq.transform.rotate import Rewrite


TURNS_NAME = "outlierq.turns"  # safetensors under a name that no program takes for weights


class RewrittenCheckpoint(RemodelledCheckpoint):
    """A checkpoint with changed tensors.

    original: what is read. rewrite: what changes, by which method. notes: what was done, for the report. turns: where
    the changes were read from that nobody could find again, to be kept beside the result.
    """

    def __init__(
        self,
        original: Checkpoint,
        rewrite: Rewrite,
        method: str,
        options: Mapping[str, Any] | None = None,
        turns: CarriedFile | None = None,
    ):
        super().__init__(original, [method, options or {}, *([] if turns is None else [digest_of(turns)])])
        self.turns = turns
        self.rewrite, self.method = rewrite, method
        self.notes: tuple[str, ...] = rewrite.notes
        self.config: dict[str, Any] = original.config
        self.tensors: dict[str, TensorInfo] = dict(original.tensors)
        if rewrite.untied:
            self._untie(*rewrite.untied)
        self.tensors |= rewrite.zeros
        for path, value in rewrite.settings.items():
            self.config = _with(self.config, path, value)
        for name in rewrite.changes:
            dtype = self.tensors[name].dtype
            if dtype not in WEIGHT_DTYPES:
                raise SourceError(
                    f"{name} is stored as {dtype}; only {', '.join(WEIGHT_DTYPES)} tensors can be rewritten",
                    hint="start from the original checkpoint",
                )

    def _untie(self, head: str, table: str) -> None:
        """Give the head a tensor of its own, and say what that costs."""
        shared = self.tensors[table]
        self.tensors[head] = TensorInfo(head, shared.dtype, shared.shape, shared.nbytes)
        self.config = _untied(self.config)
        self.notes += (f"rotate: {head} can no longer share the tensor of {table}: {shared.nbytes:,} bytes more",)

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """Those of the original, and the turns."""
        others = tuple(file for file in self.original.files if file.name != TURNS_NAME)
        return others if self.turns is None else (*others, self.turns)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, rewritten, in the shape of its header and its stored dtype. RecipeError while it is not known."""
        from outlierq.load.source.shards import torch_dtype

        if self.rewrite.pending and name in self.rewrite.changes:
            raise RecipeError(self.rewrite.pending, hint="`outlierq quantize` lets the model run first")
        change = self.rewrite.changes.get(name)
        if change is not None:
            return change.apply(self.original.read, torch_dtype(self.tensors[name].dtype))
        return self.zeros(name) if name in self.rewrite.zeros else self.original.read(name)

    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself."""
        change, below = self.rewrite.changes.get(name), self.original
        if change is None:
            return 0 if name in self.rewrite.zeros else below.making_bytes(name)
        read = {change.source, change.weight or change.source}
        stored = sum(below.tensors[source].nbytes + below.making_bytes(source) for source in read)
        copy = self.tensors[name].nbytes if change.transposed else 0  # its rows and columns change places
        return stored + copy + change.making_bytes(below.tensors[change.weight or change.source].shape)

    def zeros(self, name: str) -> torch.Tensor:
        """What a tensor that was added holds, in the shape of its header."""
        import torch

        from outlierq.load.source.shards import torch_dtype

        info = self.rewrite.zeros[name]
        return torch.zeros(info.shape, dtype=torch_dtype(info.dtype))


def digest_of(file: CarriedFile) -> str:
    """Of what it holds."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(file.read()))


def _with(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The config with another value at the path."""
    key, *rest = path
    return {**config, key: _with(config[key], tuple(rest), value) if rest else value}


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The config, and those nested in it, with a head that shares nothing."""
    changed = {
        key: _untied(value) if isinstance(value, dict) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    }
    return {**changed, "tie_word_embeddings": False}
