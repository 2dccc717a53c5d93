"""Where outlierq keeps what it need not find out twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$OUTLIERQ_CACHE, else `outlierq` in the user's cache folder."""
    named = os.environ.get("OUTLIERQ_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "outlierq"
