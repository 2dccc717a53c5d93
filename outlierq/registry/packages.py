"""Which package a function comes from, and what code it is: for messages, and for the identity of a run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

OURS = "outlierq"
# Top-level modules of packages that told us their name, as "name version"; an editable install knows no other way.
TOLD: dict[str, str] = {}


def package_of(function: Callable[..., Any]) -> str:
    """ "outlierq", "the package own-method 0.1.0", or "the module own_method" where no package is known to have it."""
    top = function.__module__.partition(".")[0]
    if top == OURS:
        return OURS
    package = _installed(top)
    return f"the package {package}" if package else f"the module {function.__module__}"


def _installed(top: str) -> str | None:
    """ "name version" of the installed package that has a top-level module."""
    names = metadata.packages_distributions().get(top, ()) if top not in TOLD else ()
    return TOLD.get(top) or next((f"{name} {metadata.version(name)}" for name in names), None)


@cache  # a file that is changed later is not the code that runs
def code(function: Callable[..., Any]) -> str | None:
    """Name and version of its package, where it has one, its module, and the sha256 of its file; None for our own."""
    if function.__module__.partition(".")[0] == OURS:
        return None
    file = Path(getattr(sys.modules.get(function.__module__), "__file__", None) or "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "unknown, it has no file"
    return f"{package_of(function)}: {function.__module__}, sha256 {digest}"
