"""docs/recipe-reference.md: every key of a recipe, from the schema, and every method, from its signature.

    python scripts/recipe_reference.py           # prints the page
    python scripts/recipe_reference.py --write   # writes it

What a key means stands in the docstring of its section or method, as `key: meaning.`; tests/test_recipe_reference.py
holds that every key has such words, and that the page is current.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what is described is the tree that this script stands in, whatever is installed

PAGE = ROOT / "docs" / "recipe-reference.md"
OPTIONS = "options"  # stands for the method's own keys
# `key: ` or `key, other: ` at the start of a sentence.
ENTRY = re.compile(r"(?:^|(?<=[.;:)] ))(?P<keys>[a-z_0-9]+(?:, [a-z_0-9]+)*): ")
STAGES = {
    "quantize": ("`quantize.method`", "rounds weights"),
    "transform": ("`transform[].method`", "scales the channels of an input"),
    "rewrite": ("`transform[].method`, the whole model", "changes the weights and not what the model computes"),
    "turn": ("`transform[].method`, the whole model on a text", "turns channels by what it sees, and changes nothing"),
    "permute": ("`transform[].method`, order of channels", "brings channels into another order"),
    "prune": ("`transform[].method`, experts", "drops experts"),
    "learn": ("`learn.method`", "improves a whole rounded block"),
}
HEAD = """# Recipe reference

Made by `scripts/recipe_reference.py` of the schema and the methods' signatures; do not edit it. How to write a recipe:
[Write a recipe](write-a-recipe.md). A missing section is off, an unknown key is an error.
"""


def main() -> None:
    """Prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text)
    else:
        print(text, end="")


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *sections(), *methods(), *formats(), *statistics(), *shipped(), ""])


def sections() -> Iterator[str]:
    """The sections of a recipe, in its order."""
    from outlierq.recipe import sections as of
    from outlierq.recipe.schema import Recipe

    yield "## Sections\n"
    yield "| key | what it is |\n|---|---|"
    yield "| `description` | one line, which `outlierq recipes list` shows |"
    listed = {
        "calibration": of.Calibration,
        "calibration.text[]": of.TextSource,
        "calibration.images": of.ImageSource,
        "transform[]": of.Transform,
        "quantize": of.Quantize,
        "quantize.activations": of.Activations,
        "quantize.overrides[]": of.Override,
        "learn": of.Learn,
        "kv_cache": of.KVCache,
        "export": of.Export,
        "gate": of.Gate,
    }
    assert {name for name in Recipe.model_fields if name not in ("name", "description")} <= {
        key.rstrip("[]") for key in listed
    }
    for key, section in listed.items():
        yield f"| [`{key}`](#{anchor(key)}) | {first_sentence(section)} |"
    for key, section in listed.items():
        yield f"\n### {key}\n\n{first_sentence(section)}\n"
        yield from table(section_rows(section))


def section_rows(section: Any) -> Iterator[tuple[str, str, str, str]]:
    """(key, values, default, meaning) of every key of a section."""
    hints = get_type_hints(section, include_extras=True)
    said = meanings(inspect.getdoc(section) or "", section.model_fields)
    for name, field in section.model_fields.items():
        if name == OPTIONS:
            continue
        limits = "".join(map(limit, field.metadata))
        default = "required" if field.is_required() else value(field.get_default(call_default_factory=True))
        beside = "as in `quantize`" if section.__name__ == "Override" else ""
        yield name, f"{kind(hints[name])}{limits}", default, said.get(name, beside)


def methods() -> Iterator[str]:
    """Every method by its stage."""
    from outlierq.registry import STAGES as ALL
    from outlierq.registry import methods

    assert set(STAGES) | {"approximate"} == set(ALL)
    yield "\n## Methods\n\nA method's own keys stand beside `method` in its section."
    for stage, (where, what) in STAGES.items():
        yield f"\n### {where}\n\nWhat {what}."
        for name, method in methods(stage).items():
            if method.function.__module__.startswith("outlierq."):
                yield from method_lines(name, method)


def method_lines(name: str, method: Any) -> Iterator[str]:
    """One method: what it does, where it comes from, what it reads, and its keys."""
    needs = ", ".join(f"`{each}`" for each in sorted(method.needs)) or "nothing"
    more = [
        f"with `{option}: {chosen}` also {', '.join(f'`{each}`' for each in names)}"
        for option, by in method.needs_if.items()
        for chosen, names in by.items()
        if names
    ]
    yield f"\n#### {name}\n\n{method.summary.rstrip('.')}."
    yield f"\nSource: {method.paper}. Reads {', '.join([needs, *more])}.\n"
    if method.options:
        yield from table(method_rows(method))


def method_rows(method: Any) -> Iterator[tuple[str, str, str, str]]:
    """(key, values, default, meaning) of every option."""
    said = meanings(inspect.getdoc(method.function) or "", method.options)
    for name, option in method.options.items():
        yield name, kind(option.annotation), value(option.default), said.get(name) or as_elsewhere(method, name)


def as_elsewhere(method: Any, option: str) -> str:
    """What a method that it was made of says of an option; empty when there is none."""
    from outlierq.registry import STAGES, methods

    for name, other in ((name, other) for stage in STAGES for name, other in methods(stage).items()):
        meaning = meanings(inspect.getdoc(other.function) or "", [option]).get(option)
        source = Path(inspect.getsourcefile(method.function) or "").read_text()
        if meaning and re.search(rf"import .*\b{other.function.__name__}\b|def {other.function.__name__}\(", source):
            return f"as in `{name}`: {meaning}"
    return ""


def formats() -> Iterator[str]:
    """What `export.format` may be."""
    from outlierq.registry import formats

    yield "\n## Formats\n\nWhat `export.format` and `--format` take. Which program loads what, `plan` says.\n"
    yield "| format | what it is |\n|---|---|"
    for name, made in formats().items():
        if made.__module__.startswith("outlierq."):
            text = " ".join((inspect.getdoc(sys.modules[made.__module__]) or "").split())
            first = re.split(r"(?<=[.]) |; ", text)[0].removeprefix(f"`{name}`: ")
            yield f"| `{name}` | {cell(first)} |"


def statistics() -> Iterator[str]:
    """What calibration keeps of every input."""
    from outlierq.core.stats import InputStats

    names = [field.name for field in fields(InputStats)]
    said = meanings(inspect.getdoc(InputStats) or "", names)
    derived = {"mean": InputStats.mean, "abs_mean": InputStats.abs_mean, "abs_max": InputStats.abs_max}
    yield "\n## Statistics\n"
    yield "What calibration keeps of one input of a block, of K channels. Methods name what they read.\n"
    yield "| name | what it is |\n|---|---|"
    for name in names:
        yield f"| `{name}` | {cell(said.get(name, ''))} |"
    for name, made in derived.items():
        yield f"| `{name}` | {cell(inspect.getdoc(made) or '')} |"


def shipped() -> Iterator[str]:
    """Every recipe that comes with outlierq."""
    from outlierq.recipe import load, shipped

    yield "\n## Shipped recipes\n\n`outlierq recipes show NAME` prints one with its comments.\n"
    yield "| recipe | what it is | reads text |\n|---|---|---|"
    for name in shipped():
        recipe = load(name)
        yield f"| `{name}` | {cell(recipe.description)} | {'yes' if recipe.all_needs else 'no'} |"


def meanings(docstring: str, keys: Iterable[str]) -> dict[str, str]:
    """What a docstring says of each key, as `key: meaning`, or `key, other: meaning` for several."""
    known = set(keys)
    found: dict[str, str] = {}
    for paragraph in docstring.split("\n\n"):
        text = " ".join(paragraph.split())
        entries = list(ENTRY.finditer(text))
        for entry, following in zip(entries, [*entries[1:], None], strict=False):
            meaning = text[entry.end() : following.start() if following else len(text)].strip(" ;")
            found |= {key: meaning for key in entry["keys"].split(", ") if key in known}
    return found


def table(rows: Iterable[tuple[str, str, str, str]]) -> Iterator[str]:
    """Rows of keys in Markdown."""
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for name, values, default, meaning in rows:
        yield f"| `{name}` | {values} | {default} | {cell(meaning)} |"


def first_sentence(section: Any) -> str:
    """What a section is, from its docstring."""
    return cell((inspect.getdoc(section) or "").split("\n\n")[0])


def cell(text: str) -> str:
    """Text in one line, safe in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def kind(hint: Any) -> str:
    """What a key may be, in words."""
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        return kind(base) + "".join(map(limit, limits))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{each}`" for each in get_args(hint))
    if get_origin(hint) is tuple:
        inner = [each for each in get_args(hint) if each is not ...]
        return f"a list: {kind(inner[0])}" if ... in get_args(hint) else " and ".join(map(kind, inner))
    arms = [each for each in get_args(hint) if each is not type(None)]
    if arms:
        return " or ".join(map(kind, arms))
    plain = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}
    return plain.get(hint, "a section of its own" if inspect.isclass(hint) else str(hint))


def limit(metadata: Any) -> str:
    """A bound of `annotated_types` in words; nothing for what is no bound."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [f"{word} {getattr(metadata, name):g}" for name, word in words.items() if hasattr(metadata, name)]
    least = getattr(metadata, "min_length", None)
    return "".join(f", {bound}" for bound in bounds) + (f", at least {least}" if least else "")


def value(default: Any) -> str:
    """A default as YAML has it."""
    if default is None:
        return "left out"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return ", ".join(value(each) for each in default) or "`[]`"
    if hasattr(default, "path"):
        return f"`{default.path}`"
    return f"`{default}`" if default != "" else "empty"


if __name__ == "__main__":
    main()
