"""What changed models have in common: they read another checkpoint, and are known by what they change."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from outlierq.core.model import Checkpoint, DerivedCheckpoint


class RemodelledCheckpoint(DerivedCheckpoint):
    """A changed model. identity: what is changed, as plain values."""

    def __init__(self, original: Checkpoint, identity: Any):
        super().__init__(original)
        self._identity = identity

    @property
    def fingerprint(self) -> str:
        """Of the original and of what is changed."""
        text = json.dumps([self.original.fingerprint, self._identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
