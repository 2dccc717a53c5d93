"""Recipe files: those that come with outlierq, and those of users."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import yaml

from outlierq.core.errors import RecipeError, nearest


def shipped() -> dict[str, Path]:
    """The recipes that come with outlierq, by name: inside the package, or beside it in a checkout."""
    package = Path(str(resources.files("outlierq")))
    folder = package / "recipes"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def description(path: Path) -> str:
    """The one-line description in a recipe file, without checking the rest."""
    return str(yaml.safe_load(path.read_text(encoding="utf-8")).get("description", ""))


def find(reference: str) -> Path:
    """The file of a recipe given as a path or as the name of a shipped recipe (with or without `.yaml`)."""
    path = Path(reference)
    if path.is_file():
        return path
    known = shipped()
    name = reference.removesuffix(".yaml")
    if name in known:
        return known[name]
    close = nearest(name, list(known))
    raise RecipeError(
        f"there is no recipe file {reference!r} and no shipped recipe of that name; shipped: {', '.join(known)}",
        hint=f"did you mean {close!r}?" if close else "give a path to a YAML file, or see `outlierq recipes list`",
    )


def read(path: Path) -> str:
    """The text of a recipe file; RecipeError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: byte {error.start} does not fit") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
