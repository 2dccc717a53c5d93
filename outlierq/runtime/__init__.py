"""Packed weights at run time: one module for every format, and the fastest product that the device has for it.

`linear.QuantLinear` holds the weight; `dispatch` registers the products with torch; `cpu` and `layout` are the CPU's.
Public names are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the names are, for the type checker
    from outlierq.runtime.linear import QuantLinear as QuantLinear
    from outlierq.runtime.linear import summary as summary

_HOMES = {"QuantLinear": "linear", "summary": "linear"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
