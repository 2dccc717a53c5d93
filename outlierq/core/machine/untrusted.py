"""JSON and YAML from files that nobody vouches for: a fault of any kind becomes one error, and the size is bounded.

The parsers alone are not enough: json raises RecursionError on deep nesting and ValueError on a number of 5000 digits;
PyYAML raises whatever its constructors stumble over, and its aliases make a few hundred bytes stand for gigabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.printable import printable

if TYPE_CHECKING:
    import yaml
    from pydantic import TypeAdapter

LARGEST_JSON = 100_000_000  # bytes; the index of a model with a million tensors
LARGEST_YAML = 1 << 16  # bytes; PyYAML reads some 200 kB/s, and a recipe has a few kB
MOST_YAML_NODES = 20_000  # after aliases are expanded
DEEPEST = 64
T = TypeVar("T")
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def json_value(
    raw: bytes | str,
    name: str,
    error: type[OutlierqError] = OutlierqError,
    *,
    hint: str | None = None,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Json:
    """The value in a JSON text; `error` says that `name` is not JSON, and why. pairs: json's `object_pairs_hook`."""
    text = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if len(text) > LARGEST_JSON:
        raise error(f"{name} has {len(text)} bytes; more than {LARGEST_JSON} are not read", hint=hint)
    try:
        # Decoded here, since json guesses other encodings and lets halves of characters through.
        value: Json = json.loads(text.decode("utf-8-sig"), object_pairs_hook=pairs)
        if SURROGATE.search(text):  # half a character cannot be written or printed anywhere
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as fault:
        raise error(f"{name} is not JSON that can be read: it is nested too deeply", hint=hint) from fault
    except ValueError as fault:
        raise error(f"{name} is not JSON: {fault}", hint=hint) from fault
    _check_depth(value, name, error, hint)
    return value


def json_object(
    raw: bytes | str,
    name: str,
    error: type[OutlierqError] = OutlierqError,
    *,
    hint: str | None = None,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> dict[str, Any]:
    """The same for a text that must hold an object."""
    value = json_value(raw, name, error, hint=hint, pairs=pairs)
    if not isinstance(value, dict):
        raise error(f"{name} is a {type(value).__name__}, not an object", hint=hint)
    return value


def checked(kind: type[T], values: Any, name: str, error: type[OutlierqError] = OutlierqError) -> T:
    """The dataclass `kind` made of plain values, JSON's lists as tuples; `error` names the first that does not fit."""
    from pydantic import ValidationError

    try:
        value: T = _adapter(kind).validate_python(values)  # type: ignore[arg-type]  # a class can be hashed
        return value
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{first['msg']} (this is {brief(first['input'])})"
        raise error(f"the {name} is not valid at {brief(where)}: {said}") from None


@lru_cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """pydantic's validator of a dataclass; made once, since that costs milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def brief(value: Any, length: int = 100) -> str:
    """A value short enough for a message, on one line and harmless, whatever it is."""
    text = printable(str(value)[: length + 1], lines=False)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _check_depth(value: Any, name: str, error: type[OutlierqError], hint: str | None) -> None:
    """Whatever walks the value later may recurse, so its depth is bounded; level by level, without recursion."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise error(f"{name} is nested more than {DEEPEST} deep", hint=hint)


def yaml_tree(text: str, name: str, error: type[OutlierqError] = OutlierqError) -> tuple[Any, yaml.Node | None]:
    """(value, node tree with line numbers) of a YAML text of plain values; `error` says what is wrong with it."""
    import yaml

    size = len(text.encode("utf-8", "surrogatepass"))
    if size > LARGEST_YAML:
        raise error(f"{name} has {size} bytes; more than {LARGEST_YAML} are not read")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(tree, name, error)
        return yaml.safe_load(text), tree
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise error(f"{name}: not valid YAML{where}: {getattr(fault, 'problem', None) or fault}") from fault
    except RecursionError as fault:
        raise error(f"{name}: not valid YAML: it is nested too deeply") from fault
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as fault:
        # What the constructors of PyYAML let through: a date in month 13, `!!bool maybe`, a number of 5000 digits.
        raise error(f"{name}: not valid YAML: a value cannot be read ({fault})") from fault


def _check_size(tree: yaml.Node | None, name: str, error: type[OutlierqError]) -> None:
    """How many values the text stands for once aliases are expanded, and how deep; an alias into itself is endless."""
    measured: dict[int, tuple[int, int]] = {}  # node -> values in it, levels below it

    def measure(node: Any, depth: int) -> tuple[int, int]:
        if depth > DEEPEST:
            raise error(f"{name}: not a plain YAML text: nested more than {DEEPEST} deep, or an alias into itself")
        if id(node) not in measured:
            parts = node.value if isinstance(node.value, list) else ()
            children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
            sizes = [measure(child, depth + 1) for child in children]
            measured[id(node)] = (1 + sum(s for s, _ in sizes), 1 + max((d for _, d in sizes), default=0))
        size, levels = measured[id(node)]
        if depth + levels > DEEPEST + 1:
            raise error(f"{name}: not a plain YAML text: nested more than {DEEPEST} deep")
        return size, levels

    size = 0 if tree is None else measure(tree, 0)[0]
    if size > MOST_YAML_NODES:
        raise error(f"{name}: its aliases stand for {size} values; more than {MOST_YAML_NODES} are not read")
