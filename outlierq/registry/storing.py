"""What a format says of itself to a recipe, and the table of all formats. How one writes: `outlierq.export.format`.

A format is a class with a name in a module of `outlierq.export`, or in one that an installed package names under the
entry points `outlierq.formats`. Nothing is imported before a format is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from outlierq.core.errors import MethodError
from outlierq.core.scheme import QuantScheme
from outlierq.registry.declaring import OUTLIER_COLUMNS
from outlierq.registry.finding import import_folder, unknown
from outlierq.registry.outside import import_installed
from outlierq.registry.packages import code, package_of

FOLDER, GROUP = "outlierq.export", "outlierq.formats"


@dataclass(frozen=True)
class Asked:
    """What a recipe asks of its format, beside schemes.

    method: that rounds, None without a `quantize` section. gives: what a format must know of its results
    (`OUTLIER_COLUMNS`). cache: whether the KV cache gets scales. sequential: whether blocks are calibrated on what was
    written of earlier ones.
    """

    method: str | None
    gives: frozenset[str]
    cache: bool
    sequential: bool


class FormatLimits:
    """What a format cannot hold, asked of the class: no model is needed. `class Awq(..., name="awq")` registers it.

    name: as `export.format` has it. scale_dtype: that of its scales, None for the model's. holds_unquantized: a model
    of which nothing is quantized. holds_outlier_columns: columns that stay in 16 bits. holds_cache_scales: scales of a
    KV cache. holds_types: types and mixes of GGUF by their names. reads_back: whether written blocks can be read again
    under the names of the model.
    """

    name: ClassVar[str]
    scale_dtype: ClassVar[str | None] = None
    holds_unquantized: ClassVar[bool] = False
    holds_outlier_columns: ClassVar[bool] = False
    holds_cache_scales: ClassVar[bool] = False
    holds_types: ClassVar[bool] = False
    reads_back: ClassVar[bool] = True

    def __init_subclass__(cls, *, name: str | None = None, **more: Any) -> None:
        """Register the class under a name; without one it is a base of others. MethodError when the name is taken."""
        super().__init_subclass__(**more)
        if name is not None:
            cls.name = name
            _check_name(cls)
            FORMATS[name] = cls

    @classmethod
    def scheme_faults(cls, scheme: QuantScheme) -> list[str]:
        """Why no linear can be stored like that, each as "key of `quantize`: reason"."""
        if scheme.kind == "outlier-victim":
            return [f"kind: {cls.name} has no outlier-victim pairs; `export.format: outlierq-olive` has"]
        if scheme.kind == "int" and scheme.scales == "two-level":
            return [f"scales: {cls.name} has no two-level scales of integers; `export.format: gguf` has"]
        return []

    @classmethod
    def recipe_faults(cls, asked: Asked) -> list[str]:
        """What else of a recipe it cannot hold, each as "key: reason"."""
        faults = []
        if asked.method is None and not asked.cache and not cls.holds_unquantized:
            faults.append("export.format: without a `quantize` section only `dense` can be written")
        if asked.sequential and not cls.reads_back:
            faults.append(
                f"calibration.mode: sequential reads back what was written, which {cls.name} does not offer; use static"
            )
        if asked.cache and not cls.holds_cache_scales:
            faults.append(f"export.format: {cls.name} holds no scales of a KV cache; compressed-tensors does")
        if OUTLIER_COLUMNS in asked.gives and not cls.holds_outlier_columns:
            faults.append(f"export.format: {cls.name} cannot keep outlier columns in 16 bits; outlierq-split can")
        return faults


FORMATS: dict[str, type[FormatLimits]] = {}


def _check_name(made: type[FormatLimits]) -> None:
    """MethodError when another format has the name; a module that is imported again may say the same again."""
    other = FORMATS.get(made.name)
    if other is not None and (other.__module__, other.__qualname__) != (made.__module__, made.__qualname__):
        raise MethodError(
            f"two formats are called {made.name!r}: one of {package_of(other)}, one of {package_of(made)}",
            hint="uninstall one of these packages, or rename its format",
        )


@cache
def _import_own() -> None:
    """Import every module of the folder of formats, whose classes register themselves."""
    import_folder(FOLDER)


def import_installed_formats() -> None:
    """Import what installed packages name: their formats, and the readers of these; MethodError."""
    import_installed(GROUP)


def formats() -> dict[str, type[FormatLimits]]:
    """Every format by name, in alphabetical order."""
    _import_own()
    import_installed_formats()
    return dict(sorted(FORMATS.items()))


def format_limits(name: str) -> type[FormatLimits]:
    """The format called `name`; RecipeError with the nearest name when there is none."""
    known = formats()
    if name not in known:
        raise unknown("format", name, list(known))
    return known[name]


def code_of_format(name: str) -> str | None:
    """What code a format is that does not come with outlierq: package, version, module, sha256; None for our own."""
    made: Callable[..., Any] = format_limits(name)
    return code(made)
