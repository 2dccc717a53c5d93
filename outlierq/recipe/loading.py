"""YAML -> checked, frozen `Recipe`. Unknown keys are errors, with their line and the nearest known name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from outlierq.core.errors import RecipeError
from outlierq.core.machine.untrusted import yaml_tree
from outlierq.recipe.faults import failure, fault_of, impossible
from outlierq.recipe.published import Written, published
from outlierq.recipe.schema import Recipe
from outlierq.recipe.sections import Learn, Quantize, Section, Transform
from outlierq.recipe.shipped import find, read
from outlierq.recipe.yaml_lines import FROM_SETTING, KeyPath, Lines, apply, at, lines_of
from outlierq.registry import Method, follow, is_reference, method, transform_method

RecipeLike = str | os.PathLike[str] | Mapping[str, Any] | Recipe
Settings = Mapping[str, Any] | Sequence[str] | None
USUAL_RECIPE = "gptq-w4"
# Sections that name one method, where `transform` names several.
SINGLE: dict[str, type[Section]] = {"quantize": Quantize, "learn": Learn}


def load(reference: str, settings: list[str] | None = None, *, trust_methods: bool = False) -> Recipe:
    """Read a recipe, apply `key=value` settings, and check it; RecipeError lists every fault at once.

    trust_methods: `method: package.module:function` is imported, which runs that code.
    """
    written = text_of(reference)
    try:
        return parse(written.text, name=written.name, settings=settings, trust_methods=trust_methods)
    except RecipeError as error:
        raise written.fault(error) from None


def text_of(reference: str) -> Written:
    """The text of a recipe: of a file, a shipped one, or one that made a checkpoint here or on the Hub."""
    made = published(reference)
    if made is not None:
        return made
    path = find(reference)
    return Written(path.stem, read(path))


def given(recipe: RecipeLike, settings: Settings = None, *, trust_methods: bool = False) -> Recipe:
    """The checked recipe of a name, a path, a mapping of its keys, or one that is checked already.

    settings: `{"quantize.group_size": 64}`, or as given to `--set`. RecipeError lists every fault at once.
    """
    texts = as_texts(settings)
    if isinstance(recipe, Mapping):
        return parse(_yaml(recipe), settings=texts, trust_methods=trust_methods)
    if not isinstance(recipe, Recipe):
        return load(os.fspath(recipe), texts, trust_methods=trust_methods)
    if texts:
        raise RecipeError(
            f"{', '.join(texts)}: settings change the text of a recipe, and {recipe.name} was read already",
            hint="give the recipe's name, its path or its keys, or read it with these settings",
        )
    return recipe


def as_texts(settings: Settings) -> list[str]:
    """Settings as given to `--set`."""
    if isinstance(settings, Mapping):
        return [f"{key}={_yaml(value)}" for key, value in settings.items()]
    return list(settings or ())


def _yaml(value: Any) -> str:
    """A plain value in one line of YAML, which is read back as the same value."""
    plain = json.loads(json.dumps(value, default=str))  # tuples and paths are none
    text: str = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.strip().removesuffix("...").strip()


def parse(text: str, *, name: str = "recipe", settings: list[str] | None = None, trust_methods: bool = False) -> Recipe:
    """Check the text of a recipe. `settings` are `quantize.group_size=64`, as given to `--set`."""
    faults: list[str] = []
    content, tree = yaml_tree(text, name, RecipeError)
    lines = lines_of(tree, faults)
    if not isinstance(content, dict):
        raise RecipeError(f"{name}: a recipe is a mapping of keys to values, this is a {type(content).__name__}")
    for setting in settings or []:
        path = apply(content, setting)
        lines |= {path[: end + 1]: FROM_SETTING for end in range(len(path)) if path[: end + 1] not in lines}
        lines[path] = FROM_SETTING
    if "name" in content:
        faults.append(f"{at(('name',), lines)}unknown key; a recipe is named after its file")
        del content["name"]
    known = [_split_options(content, path, faults, lines, trust_methods) for path in _method_sections(content)]
    try:
        recipe = Recipe.model_validate({**content, "name": name})
    except ValidationError as error:
        faults += [fault_of(e, lines) for e in error.errors()]
        raise failure(name, faults) from None
    if all(known):
        faults += impossible(recipe)
    if faults:
        raise failure(name, faults)
    return recipe


def _method_sections(content: dict[str, Any]) -> list[KeyPath]:
    """Paths of the sections that name a method."""
    transforms = content.get("transform")
    sections: list[KeyPath] = [("transform", i) for i in range(len(transforms))] if isinstance(transforms, list) else []
    return sections + [(name,) for name in SINGLE if isinstance(content.get(name), dict)]


def _split_options(
    content: dict[str, Any], path: KeyPath, faults: list[str], lines: Lines, trust_methods: bool
) -> bool:
    """Move the method's own keys of a section into `options`, checked against the method's signature.

    Returns False for a method that is not known.
    """
    part, key = str(path[0]), path[-1]
    parent: Any = content if len(path) == 1 else content[part]
    section = parent[key]
    if isinstance(section, str):
        section = {"method": section}
    parent[key] = section
    if not isinstance(section, dict) or not isinstance(section.get("method"), str):
        return True  # what is wrong with it is said by the model
    model = SINGLE.get(part, Transform)
    own = [name for name in model.model_fields if name != "options"]
    parent[key] = {k: v for k, v in section.items() if k in own}
    try:
        entry = _method(part, section["method"], trust_methods)
    except RecipeError as error:
        faults.append(f"{at((*path, 'method'), lines)}{error.what}" + (f" ({error.hint})" if error.hint else ""))
        return False
    rest = {k: v for k, v in section.items() if k not in own}
    try:
        parent[key]["options"] = _options_model(entry).model_validate(rest).model_dump(exclude_unset=True)
    except ValidationError as error:
        known = [*own, *entry.options]
        faults += [fault_of({**e, "loc": (*path, *e["loc"])}, lines, known) for e in error.errors()]
    return True


def _method(section: str, name: str, trust_methods: bool) -> Method:
    """What `method: name` means in a section of a recipe; RecipeError."""
    if is_reference(name):
        return follow(section, name, trusted=trust_methods)
    return transform_method(name) if section == "transform" else method(section, name)


def _options_model(entry: Method) -> type[BaseModel]:
    """A pydantic model of a method's keyword-only arguments."""
    fields: dict[str, Any] = {name: (p.annotation, p.default) for name, p in entry.options.items()}
    return create_model(entry.name, __config__=ConfigDict(extra="forbid"), **fields)
