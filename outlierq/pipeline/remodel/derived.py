"""What checkpoints on top of a checkpoint have in common: they read another one, and are known by what they change."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any

from outlierq.core.model import CarriedFile, Checkpoint


class DerivedCheckpoint(ABC):
    """A checkpoint made of another. original: what is read. identity: what is changed, as plain values."""

    def __init__(self, original: Checkpoint, identity: Any):
        self.original, self._identity = original, identity
        self.source, self.kind, self.dtype = original.source, original.kind, original.dtype
        self.path, self.revision = getattr(original, "path", None), getattr(original, "revision", None)

    @property
    def files(self) -> tuple[CarriedFile, ...]:
        """The files of the original."""
        return self.original.files

    @property
    def fingerprint(self) -> str:
        """Of the original and of what is changed."""
        text = json.dumps([self.original.fingerprint, self._identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @abstractmethod
    def making_bytes(self, name: str) -> int:
        """Upper bound of what reading a tensor holds beside the tensor itself."""


def making_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Upper bound of what reading a tensor holds beside the tensor itself: nothing where it is stored as it is."""
    return checkpoint.making_bytes(name) if isinstance(checkpoint, DerivedCheckpoint) else 0
