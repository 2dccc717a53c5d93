"""What is installed: libraries of an extra that are missing, and libraries older than outlierq can use.

Either is said in one sentence before work starts, with the line that mends it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from outlierq.core.errors import OutlierqError

# What may be missing -> the extra that brings it.
EXTRAS = {
    "PIL": "vision",
    "datasets": "datasets",
    "gguf": "gguf",
    "lm_eval": "eval",
    "pyarrow": "datasets",
    "vl_convert": "report",
}


def needs_extra(module: str) -> None:
    """OutlierqError where `module`, one of `EXTRAS`, is not installed."""
    if find_spec(module) is None:
        raise OutlierqError(f"{module} is not installed", hint=f"pip install 'outlierq[{EXTRAS[module]}]'")


@cache
def check_versions() -> None:
    """OutlierqError where a library is older than outlierq's own metadata ask for.

    A newer one than they allow is let pass: it was not tried, and may well do.
    """
    from packaging.requirements import Requirement

    for requirement in map(Requirement, _requirements()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needs_version(requirement.name, str(requirement.specifier), "outlierq")


def needs_version(name: str, allowed: str, what: str) -> None:
    """OutlierqError where the installed `name` is older than `allowed` (">=5.18,<6"), which `what` needs.

    A library that is missing says so itself when it is imported.
    """
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    try:
        there = version(name)
    except PackageNotFoundError:
        return
    lowest = [bound for bound in SpecifierSet(allowed) if bound.operator == ">="]
    if not all(bound.contains(there, prereleases=True) for bound in lowest):
        raise OutlierqError(
            f"{name} {there} is too old: {what} needs {name}{allowed}",
            hint=f"pip install --upgrade '{name}{allowed}'",
        )


def _requirements() -> list[str]:
    """Our own Requires-Dist; nothing where outlierq runs without being installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        return requires("outlierq") or []
    except PackageNotFoundError:
        return []
