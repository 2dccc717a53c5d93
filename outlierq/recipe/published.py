"""Recipes that made something: in the report beside a checkpoint, here or on the Hub, and as YAML that runs again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from outlierq import __version__
from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.machine.hub import asking
from outlierq.core.machine.printable import printable
from outlierq.core.machine.untrusted import brief, json_object
from outlierq.core.report import REPORT_NAME, report_of_file
from outlierq.recipe.schema import Recipe
from outlierq.recipe.sections import SCHEME_KEYS

HUB = "hf:"
REFERENCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Written:
    """The text of a recipe. made_by: the version of outlierq that ran it, "" for a file."""

    name: str
    text: str
    made_by: str = ""

    def fault(self, error: RecipeError) -> RecipeError:
        """An error in it, with the reason where a newer outlierq made it."""
        if not _is_newer(self.made_by):
            return error
        said = f"{self.name} was made by outlierq {self.made_by}, and this is {__version__}: {error.what}"
        return RecipeError(said, hint="pip install --upgrade outlierq")


def recipe_yaml(settings: Mapping[str, Any]) -> str:
    """The settings of a report as a recipe that outlierq reads, without what is not set. RecipeError for settings of
    other keys than this version has."""
    try:
        recipe = Recipe.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        raise RecipeError(f"the recipe of the report has {brief(where)!r}, which this outlierq does not know") from None
    full = recipe.model_dump(mode="json")
    short = _flat(_set(full, recipe.model_dump(mode="json", exclude_defaults=True)))
    text: str = yaml.safe_dump(short, sort_keys=False, allow_unicode=True)
    return text


def published(reference: str) -> Written | None:
    """The recipe that made something, None for a reference to anything else.

    reference: "hf:owner/name", with "@revision" behind it or not; a folder that `quantize` wrote; a GGUF file of it.
    """
    if reference.startswith(HUB):
        return _read(_downloaded(reference), reference)
    path = Path(reference).expanduser()
    report = path / REPORT_NAME if path.is_dir() else report_of_file(path)
    if not report.is_file() or path.suffix in (".yaml", ".yml"):
        if path.is_dir():
            raise RecipeError(f"{reference} is a folder without {REPORT_NAME}, so no recipe is known of it")
        return None
    return _read(report, reference)


def is_published(reference: str) -> bool:
    """Whether this may be the name of a repository on the Hub, "owner/name", and is nothing here."""
    return REFERENCE.fullmatch(reference) is not None and not Path(reference).exists()


def _downloaded(reference: str) -> Path:
    """The report of a repository on the Hub."""
    found = REFERENCE.fullmatch(reference.removeprefix(HUB))
    if found is None:
        raise RecipeError(f"{brief(repr(reference))} is no recipe on the Hub", hint="write hf:owner/name")
    from huggingface_hub import errors, hf_hub_download

    repository, revision = found.groups()
    try:
        with asking(repository, revision):
            try:
                return Path(hf_hub_download(repository, REPORT_NAME, revision=revision))
            except errors.RemoteEntryNotFoundError:
                raise RecipeError(
                    f"{repository} has no {REPORT_NAME}: outlierq did not make it, and its recipe is not known",
                    hint="`outlierq inspect` says what it holds",
                ) from None
    except SourceError as error:
        raise RecipeError(f"the recipe of {repository} cannot be read: {error.what}", hint=error.hint) from error


def _read(report: Path, reference: str) -> Written:
    """The recipe in a report. RecipeError says when it was made by a newer outlierq that has what this one has not."""
    values = json_object(report.read_bytes(), f"{REPORT_NAME} of {reference}", RecipeError)
    settings, name = values.get("settings"), values.get("recipe")
    if not isinstance(settings, dict) or not isinstance(name, str):
        raise RecipeError(f"{REPORT_NAME} of {reference} holds no recipe", hint="it is no report of `quantize`")
    made_by = str((values.get("versions") or {}).get("outlierq", ""))
    said = printable(f"# The recipe of {reference}, by outlierq {made_by}.", lines=False)
    written = Written(Path(name).stem or "recipe", said, made_by)
    try:
        return replace(written, text=f"{said}\n{recipe_yaml(settings)}")
    except RecipeError as error:
        raise written.fault(error) from None


def _is_newer(version: str) -> bool:
    """Whether another outlierq is newer than this one."""
    try:
        return Version(version) > Version(__version__)
    except InvalidVersion:
        return False


def _set(full: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """What differs from what a key has by itself (`changed`), and of the two sections that matter most also plain
    values that do not, since a later version may have others by itself."""
    order = [
        name for name in full if name in changed or (full[name] is not None and name in ("calibration", "quantize"))
    ]
    shown = {name: changed.get(name, {}) for name in order}
    for name in {"calibration", "quantize"} & shown.keys():
        decided = name == "quantize" and any(full[name].get(key) is not None for key in ("type", "mix", "block"))
        plain = {key: value for key, value in full[name].items() if isinstance(value, bool | int | float | str)}
        others = SCHEME_KEYS if decided else ()
        shown[name] = {key: value for key, value in plain.items() if key not in others} | shown[name]
    return shown


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """Options of a method as keys of its section, as people write them."""
    sections = [*recipe.get("transform", []), *(recipe[name] for name in ("quantize", "learn") if name in recipe)]
    for section in sections:
        section |= section.pop("options", {})
    return recipe
