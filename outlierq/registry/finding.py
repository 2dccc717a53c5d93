"""Finding a method by its name. Nothing is imported before a method is asked for, so that --help stays fast."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from outlierq.core.errors import RecipeError, nearest
from outlierq.registry.declaring import REGISTERED, Method, section_of
from outlierq.registry.outside import REFERENCES, import_installed

# The stage folders: every module in them is imported, and one that cannot be is an error.
FOLDERS = ("outlierq.quantize", "outlierq.transform")


@cache
def _import_own() -> None:
    """Import every module of the stage folders, whose decorators register their methods."""
    for folder in FOLDERS:
        import_folder(folder)


def import_folder(folder: str) -> None:
    """Import every module of a folder and of the folders in it; one that cannot be imported raises what it raises."""
    for module in iter_modules(import_module(folder).__path__, f"{folder}."):
        import_module(module.name)
        if module.ispkg:
            import_folder(module.name)


def _of_section(section: str) -> dict[str, Method]:
    """Every method that a section of a recipe may name, in alphabetical order."""
    _import_own()
    import_installed()
    return {name: made for (where, name), made in sorted(REGISTERED.items()) if where == section}


def methods(stage: str) -> dict[str, Method]:
    """Every method of a stage, by name, in alphabetical order."""
    known = _of_section(section_of(stage))
    return {name: made for name, made in known.items() if made.stage == stage}


def method(stage: str, name: str) -> Method:
    """The method of a stage called `name`; RecipeError with the nearest name when there is none."""
    return _pick(stage, name, methods(stage))


def transform_method(name: str) -> Method:
    """What `transform:` may name, which is every method that is no quantizer; RecipeError."""
    return _pick("transform", name, _of_section("transform"))


def _pick(section: str, name: str, known: dict[str, Method]) -> Method:
    """The method called `name` among those known, or the function that was followed by that reference."""
    if (section, name) in REFERENCES:
        return REFERENCES[section, name]
    if name not in known:
        raise unknown(f"{section} method", name, list(known))
    return known[name]


def unknown(what: str, name: str, known: list[str]) -> RecipeError:
    """There is no method or format of that name: what there is, and the nearest of it."""
    close = nearest(name, known)
    return RecipeError(
        f"there is no {what} {name!r}; known: {', '.join(known)}", hint=f"did you mean {close!r}?" if close else None
    )


def ways_to(give: str) -> list[str]:
    """How a recipe gets results with a property: "`int8_split`", or "`rtn`, `scale_search: minmax`"."""
    ways = []
    for made in methods("quantize").values():
        ways += [f"`{made.name}`"] if give in made.gives else []
        options = ((name, value, gives) for name, by in made.gives_if.items() for value, gives in by.items())
        ways += [f"`{made.name}`, `{name}: {value}`" for name, value, gives in options if give in gives]
    return ways
