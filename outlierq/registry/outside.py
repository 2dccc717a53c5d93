"""Methods that do not come with outlierq: those of installed packages, and functions that a recipe names.

An installed package names modules under the entry points `outlierq.methods`; they are imported when a method is first
asked for. A recipe may name a function as `package.module:function`; that one is imported only when the user says so,
since a recipe is data, and whoever follows it does not expect to run what its author wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from types import ModuleType

from outlierq.core.errors import MethodError, RecipeError, nearest
from outlierq.registry.declaring import REGISTERED, Method
from outlierq.registry.packages import TOLD, code

GROUP = "outlierq.methods"
REFERENCES: dict[tuple[str, str], Method] = {}  # (section of a recipe, reference) -> the method that was followed


@cache
def import_installed(group: str = GROUP) -> None:
    """Import the modules that installed packages name; MethodError for one that cannot be, with its package.

    group: the entry points that name them, of methods or of formats.
    """
    named = [(entry.dist, entry.module) for entry in metadata.entry_points(group=group) if entry.dist is not None]
    for package, module in sorted(named, key=lambda each: (each[0].name, each[1])):
        _import_from(package, module, group.rpartition(".")[2])


def _import_from(package: metadata.Distribution, module: str, what: str) -> None:
    """Import a module of a package. what: methods or formats, for the message. MethodError."""
    TOLD[module.partition(".")[0]] = f"{package.name} {package.version}"
    with _all_or_nothing():
        try:
            import_module(module)
        except MethodError:
            raise  # of a decorator, which names the package
        except (Exception, SystemExit) as error:
            raise MethodError(
                f"the {what} of the package {package.name} {package.version} cannot be imported "
                f"({module}: {type(error).__name__}: {error})",
                hint=f"repair that package, or uninstall it: pip uninstall {package.name}",
            ) from error


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """What a module registers before it fails is forgotten, so that importing it again fails alike."""
    before = dict(REGISTERED)
    try:
        yield
    except BaseException:  # whatever it was, an exit of the module's own too: it is raised again
        REGISTERED.clear()
        REGISTERED.update(before)
        raise


def is_reference(name: str) -> bool:
    """Whether a method is given as `package.module:function`."""
    return ":" in name


def follow(section: str, reference: str, *, trusted: bool) -> Method:
    """Import `package.module:function` for a section of a recipe, and know it by that reference from now on.

    trusted: whether the user said so; it runs code that is not ours. RecipeError without that, when there is no such
    function, or when it is no method of this section.
    """
    if not trusted:
        raise RecipeError(
            f"{reference!r} is Python code that does not come with outlierq, and was not run",
            hint="read that code, then add --trust-methods",
        )
    name, _, function_name = reference.partition(":")
    module = _module_of(name, reference)
    function = getattr(module, function_name, None)
    if function is None:
        close = nearest(function_name, [each for each in vars(module) if not each.startswith("_")])
        raise RecipeError(
            f"{reference!r}: the module {name} has no {function_name!r}",
            hint=f"did you mean {close!r}?" if close else f"name a function that {name} defines",
        )
    made = next((each for each in REGISTERED.values() if each.function is function), None)
    if made is None:
        raise RecipeError(
            f"{reference!r} carries no decorator of outlierq.registry, so it is no method",
            hint="write @quantizer(...) or @transform(...) above the function; outlierq/quantize/rtn.py is an example",
        )
    if made.section != section:
        raise RecipeError(f"{reference!r} is a {made.stage} method", hint=f"name it under `{made.section}`")
    REFERENCES[section, reference] = made
    return made


def _module_of(name: str, reference: str) -> ModuleType:
    """The imported module of a reference; RecipeError when there is none, or it fails."""
    with _all_or_nothing():
        try:
            return import_module(name)
        except MethodError as error:
            raise RecipeError(f"{reference!r}: {error.what}", hint=error.hint) from error
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
                raise RecipeError(
                    f"{reference!r}: there is no module {error.name!r}",
                    hint="install the package that has it, or name its folder in PYTHONPATH",
                ) from error
            raise RecipeError(
                f"{reference!r}: the module {name} cannot be imported ({type(error).__name__}: {error})",
                hint=f"repair it; `python -c 'import {name}'` shows where it fails",
            ) from error


def code_of(section: str, name: str) -> str | None:
    """What code a method is that does not come with outlierq: package, version, module, sha256; None for our own."""
    made = REFERENCES.get((section, name)) or REGISTERED.get((section, name))
    return code(made.function) if made else None
