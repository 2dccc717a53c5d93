"""Recipe text -> its keys and values, the line of each key, and what `--set` changes in them."""

from __future__ import annotations

from typing import Any

import yaml

from outlierq.core.errors import RecipeError
from outlierq.core.machine.untrusted import brief, yaml_tree

FROM_SETTING = 0  # stands for a line number where a value was given with --set
KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, int]  # key path -> 1-based line, or FROM_SETTING


def lines_of(tree: yaml.Node | None, faults: list[str]) -> Lines:
    """1-based line of every key path in the YAML tree. A key that is given twice is a fault: YAML keeps the last."""
    lines: Lines = {}

    def walk(node: yaml.Node | None, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line, first = key.start_mark.line + 1, lines.get((*path, key.value))
                if first is not None:
                    name = ".".join(map(str, (*path, key.value)))
                    faults.append(f"line {line}, {name}: given twice, first in line {first}")
                lines[(*path, key.value)] = line
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*path, i)] = value.start_mark.line + 1
                walk(value, (*path, i))

    walk(tree, ())
    return lines


def apply(content: dict[str, Any], setting: str) -> KeyPath:
    """Set one `dotted.key=value` and return its path.

    The value is read as YAML, so `false`, `64` and `[a, b]` mean what they look like.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {setting!r} is not of the form key=value", hint="e.g. --set quantize.group_size=64")
    value, _ = yaml_tree(text, f"--set {brief(setting)}: {brief(repr(text))} is not a YAML value", RecipeError)
    path: list[str | int] = []
    node: Any = content
    *parents, last = key.split(".")
    for part in parents:
        path.append(_key_in(node, part, setting))
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[path[-1]]
    path.append(_key_in(node, last, setting))
    node[path[-1]] = value
    return tuple(path)


def _key_in(node: Any, part: str, setting: str) -> str | int:
    """`part` as a key of the mapping or an index of the list `node`; RecipeError when it is neither."""
    if isinstance(node, dict):
        return part
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    held = f"a list of {len(node)}" if isinstance(node, list) else repr(node)
    raise RecipeError(
        f"--set {setting}: there is no {part!r} in {held}", hint="keys are dotted: quantize.group_size=64"
    )


def at(path: KeyPath, lines: Lines) -> str:
    """ "line 7, quantize.bits: " (the nearest known line), or "--set quantize.bits: " for a value given there."""
    key = ".".join(str(p) for p in path if p != "options")
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            line = lines[path[:end]]
            return f"--set {key}: " if line == FROM_SETTING else f"line {line}, {key}: "
    return f"{key}: "
