"""A checkpoint that lies nowhere, for tests that need its headers, its config and a few values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from outlierq.core.model import Checkpoint, TensorInfo


class FakeCheckpoint(Checkpoint):
    """A checkpoint of the given headers and values."""

    source, kind, dtype, path, files, fingerprint = "here", "huggingface", "bfloat16", Path("nowhere"), (), ""

    def __init__(
        self,
        tensors: Iterable[TensorInfo] = (),
        config: dict[str, Any] | None = None,
        values: Mapping[str, torch.Tensor] | None = None,
    ):
        self.tensors = {info.name: info for info in tensors}
        self.config, self.values = config or {}, values or {}

    def read(self, name: str) -> torch.Tensor:
        return self.values[name]
