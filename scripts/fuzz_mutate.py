"""How fuzz inputs are made: a valid file is taken apart, a few of its parts are replaced by bad ones, and it is put
together again, so that most inputs get past the first check. Everything is decided by the `random.Random` given.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

LARGEST_INPUT = 1 << 16  # most faults need few bytes, and small inputs are many inputs

NUMBERS = (0, 1, -1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 4096, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62,
           2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, 1e-320, float("nan"),
           float("inf"))  # fmt: skip
WORDS = (
    "", " ", "a", "\x00", "../x", "../../../../etc/passwd", "/etc/passwd", "..", ".", "~", "x" * 300,
    "é漢\U0001f600", "\ud800",
    "outside.safetensors", "loop.safetensors", "pipe.safetensors", "folder.safetensors", "model.safetensors",
    "model-00002-of-00002.safetensors", "weights.bin", "re:(a+)+$", "re:(.*)*(.*)*(.*)*(.*)*x", "re:[", "(a|a)*b",
    "gptq", "awq", "bitsandbytes", "compressed-tensors", "outlierq", "pack-quantized", "int-quantized",
    "float-quantized", "float", "int", "group", "channel", "tensor", "token", "block", "true", "None", "F32", "BF16",
    "I8",
    "I32", "I64", "U8", "F8_E4M3", "F4", "4", "-1", "1e9", "llama", "gpt2", "${x}", "{{ 7 * 7 }}", "!!python/none",
)  # fmt: skip


def number(rng: Random) -> Any:
    """A number at the edge of something."""
    chosen = rng.choice(NUMBERS)
    return chosen + rng.choice((-1, 0, 0, 1)) if isinstance(chosen, int) else chosen


def value(rng: Random) -> Any:
    """Any JSON value, most of them of the wrong type wherever they are put."""
    kind = rng.randrange(9)
    if kind < 3:
        return number(rng)
    if kind < 5:
        return rng.choice(WORDS)
    if kind == 5:
        return rng.choice((None, True, False, [], {}, [[]], [{}], {"": None}, [None], {"a": {"b": []}}))
    if kind == 6:
        return [value(rng) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(WORDS): value(rng) for _ in range(rng.randrange(3))}
    return nested(rng)


def nested(rng: Random) -> Any:
    """Lists in lists, up to a depth at which recursion ends."""
    deep: Any = []
    for _ in range(rng.choice((3, 30, 200))):
        deep = [deep] if rng.random() < 0.7 else {"a": deep}
    return deep


def edit(tree: Any, rng: Random) -> Any:
    """A copy of a JSON tree with one to four changes."""
    tree = deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        tree = _edit_once(tree, rng)
    return tree


def _edit_once(tree: Any, rng: Random) -> Any:
    """Replace, remove, double, rename or swap at a random place; the tree itself is changed."""
    places = _places(tree)
    if not places or rng.random() < 0.01:
        return value(rng)
    holder, key = rng.choice(places)
    action = rng.randrange(10)
    if action < 5:
        holder[key] = value(rng)
    elif action == 5:
        del holder[key]
    elif action == 6:
        other, place = rng.choice(places)
        if place in (other if isinstance(other, dict) else range(len(other))):
            holder[key] = deepcopy(other[place])
    elif action == 7 and isinstance(holder, dict):
        holder[rng.choice(WORDS)] = holder.pop(key)
    elif action == 7:
        holder.append(deepcopy(holder[key]))
    elif action == 8 and isinstance(holder[key], int | float) and abs(holder[key]) < 2**70:
        holder[key] = holder[key] + rng.choice((-1, 1, 8, -8, 2**31))
    else:
        holder[key] = number(rng)
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in the tree."""
    found, open_nodes = [], [tree]
    while open_nodes:
        node = open_nodes.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            found.append((node, key))
            if isinstance(child, dict | list):
                open_nodes.append(child)
    return found


def json_text(tree: Any, rng: Random) -> bytes:
    """The tree as JSON; once in a while with something in it that no JSON writer would write."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.04:
        text = re.sub(r'("[^"]*": ?[^,{}\[\]]*)([,}])', r"\1, \1\2", text, count=rng.randrange(1, 4))  # a key twice
    if rng.random() < 0.02:
        text = text.replace(rng.choice("0123456789"), rng.choice(("9" * 5000, "1e999", "-")), 1)
    if rng.random() < 0.02:
        depth = rng.choice((100, 1000, 20000))
        text = text.replace("1", rng.choice("[{").replace("{", '{"a":') * depth, 1)
    return text.encode("utf-8", "surrogatepass")[:LARGEST_INPUT]


def json_file(seed: bytes, rng: Random) -> bytes:
    """A JSON file: its tree is changed, or now and then its bytes."""
    if rng.random() < 0.1:
        return bytes_of(seed, rng)
    return json_text(edit(json.loads(seed), rng), rng)


def json_lines(seed: bytes, rng: Random) -> bytes:
    """A file with a JSON value on every line."""
    lines = seed.splitlines()
    place = rng.randrange(len(lines))
    action = rng.randrange(8)
    if action == 0:
        return bytes_of(seed, rng)
    if action == 1:
        lines.insert(place, lines[rng.randrange(len(lines))])
    elif action == 2:
        del lines[place]
    else:
        lines[place] = json_file(lines[place], rng)
    return b"\n".join(lines) + rng.choice((b"", b"\n", b"\n", b"\n"))


def bytes_of(seed: bytes, rng: Random) -> bytes:
    """Changes that know nothing of the format: bits, numbers of 4 and 8 bytes, cuts, doublings."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not data:
            break
        at, action = rng.randrange(len(data)), rng.randrange(8)
        if action == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[at] = rng.randrange(256)
        elif action in (2, 3):
            width = 4 if action == 2 else 8
            data[at : at + width] = (int(rng.choice(NUMBERS[:27])) % 2 ** (8 * width)).to_bytes(width, "little")
        elif action == 4:
            del data[at:]
        elif action == 5:
            del data[at : at + rng.randrange(1, 16)]
        elif action == 6:
            other = rng.randrange(len(data))
            data[at:at] = data[other : other + rng.randrange(1, 64)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data[:LARGEST_INPUT])


def safetensors_file(seed: bytes, rng: Random) -> bytes:
    """Length, header and tensor bytes, each of them changed with some likelihood."""
    length = int.from_bytes(seed[:8], "little")
    header, body = seed[8 : 8 + length], seed[8 + length :]
    if rng.random() < 0.85:
        header = json_text(edit(json.loads(header), rng), rng)
    length = len(header)
    if rng.random() < 0.08:
        length = int(rng.choice((0, 1, length - 1, length + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1)))
    if rng.random() < 0.1:
        body = bytes_of(body, rng) if body else b"\x00"
    whole = (length % 2**64).to_bytes(8, "little") + header + body
    return bytes_of(whole, rng) if rng.random() < 0.05 else whole


YAML_PIECES = (
    "&a [*a]", "&a {b: *a}", "*a", "*missing", "!!python/object/apply:os.system ['true']", "!!python/name:os.system",
    "!!bool maybe", "!!int ''", "!!int x", "!!float x", "!!timestamp x", "!!binary '*'", "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!null x", "!mine 4", "2001-99-99", "2001-01-01", "1:2:3", "0x", "0o8", "0b2", "1_000",
    ".inf", ".nan",
    "-.inf", "~", "? [a]", "? {a: b} : c", "{[a]: b}", "<<: *a", "<<: [*a, *a]", "<<: 4", "|", ">", "%YAML 9.9", "---",
    "...",
    "\t", "\x00", "\ufeff", "'", '"\\ud800"', '"\\x00"', "#", "@", "`", "[" * 40, "{a: " * 40, "[" * 400, "- " * 400,
    "9" * 5000,
    "!!int " + "9" * 5000, "yes", "on", "=", "!!value 3", "{? a}", "[a, , b]", "a: b: c",
)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 8)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 90))


def yaml_file(seed: bytes, rng: Random) -> bytes:
    """A recipe: its tree written as JSON (which is YAML), or its lines with pieces of bad YAML in them."""
    action = rng.randrange(20)
    if action < 9 and b"&" not in seed:  # a bomb, written as JSON, takes all memory
        import yaml

        return json_text(edit(yaml.safe_load(seed), rng), rng)[:4096]  # PyYAML is slow
    if action < 11:
        return bytes_of(seed, rng)
    lines = seed.decode().splitlines()
    if action == 11:
        lines.insert(rng.randrange(len(lines)), rng.choice((BOMB, MERGE_BOMB, CHAIN)))
        lines.append(f"{rng.choice(('quantize', 'x', 'transform'))}: *{rng.choice('abhi')}")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        piece = rng.choice(YAML_PIECES)
        if rng.random() < 0.6 and colon:
            lines[at] = f"{key}: {piece}"
        elif rng.random() < 0.5:
            lines.insert(at, piece)
        else:
            lines[at], other = lines[rng.randrange(len(lines))], lines[at]
            lines.append(other)
    return "\n".join(lines).encode("utf-8", "surrogatepass")[:LARGEST_INPUT]


# Nothing that only takes time or memory: a template is a program, and its sandbox knows neither.
TEMPLATE_WORDS = (
    "messages", "messages[0]", "message", "message.content", "message['role']", "loop.index", "loop.last", "bos_token",
    "none", "true", "0", "-1", "3", "'x'", "''", "[]", "{}", "[1, 'a']", "{'a': 1}", "range(4)", "range(10 ** 9)",
    "namespace(a=1)", "cycler('a', 'b')", "joiner()", "dict(a=1)", "self", "caller()", "varargs", "tools", "é漢",
    "raise_exception('no')", "strftime_now('%d')", "''.__class__.__mro__", "cycler.__init__.__globals__.os.system('x')",
    "messages.append(1)", "messages.pop()", "f(1)", "x | tojson", "m | length", "m | list", "m | join", "x | int",
    "x | attr('y')", "m | map(attribute='x')", "m | selectattr('role')", "x | items", "x is string", "x is mapping",
    "in", "not", "and", "if", "(", ")", "loop", "loop(messages)", "1 / 0", "'%d' % messages", "'a' ~ messages",
)  # fmt: skip
TEMPLATE_TAGS = (
    "{% endfor %}", "{% endif %}", "{% else %}", "{% if x %}", "{% for x in messages recursive %}", "{% break %}",
    "{% continue %}", "{% generation %}", "{% endgeneration %}", "{% raw %}", "{% set x = messages %}", "{{ x }}", "{{",
    "{% set x.y = 1 %}", "{% include 'x' %}", "{% import 'os' as os %}", "{% extends messages %}", "%}", "{#",
    "{% block a %}x{% endblock %}", "{% call f() %}{% endcall %}", "{% filter upper %}x{% endfilter %}", "{% do 1 %}",
)  # fmt: skip
TEMPLATE_TAG, TEMPLATE_WORD = re.compile(r"({[%{].*?[%}]})", re.DOTALL), re.compile(r"'[^']*'|\w+(\[.*?\])?")


def template_file(seed: bytes, rng: Random) -> bytes:
    """A template: words in its tags replaced, tags removed, doubled or put in, or now and then its bytes changed."""
    if rng.random() < 0.1:
        return bytes_of(seed, rng)
    parts = TEMPLATE_TAG.split(seed.decode())
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        at = rng.randrange(len(parts))
        words = list(TEMPLATE_WORD.finditer(parts[at]))
        if words and rng.random() < 0.8:
            word = rng.choice(words)
            parts[at] = parts[at][: word.start()] + rng.choice(TEMPLATE_WORDS) + parts[at][word.end() :]
        elif rng.random() < 0.2:
            del parts[at]
            parts = parts or [""]
        else:
            parts.insert(at, rng.choice((*TEMPLATE_TAGS, *parts)))
    return "".join(parts).encode()


# GGUF: a file is made from a description: {"version", "tensors": [[name, dims, type, offset]], "fields": [[key, type,
# value]]}. Value types are those of the format, 8 is a string, 9 an array [item type, items].
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def gguf_file(description: dict[str, Any]) -> bytes:
    """The bytes of a GGUF file; numbers that do not fit are cut to their width. `counts` and `body` may lie."""
    tensors, fields = description["tensors"], description["fields"]
    counts = description.get("counts", (len(tensors), len(fields)))
    head = [b"GGUF", _packed("I", description["version"]), *(_packed("Q", count) for count in counts)]
    head += [_string(key) + _packed("I", kind) + _gguf_value(kind, held) for key, kind, held in fields]
    for name, dims, kind, offset in tensors:
        dims = dims if isinstance(dims, list) else [dims]
        head += [_string(name), _packed("I", len(dims)), *(_packed("Q", d) for d in dims), _packed("I", kind)]
        head.append(_packed("Q", offset))
    raw = b"".join(head)
    size = description.get("body", 0)
    body = bytes(size) if isinstance(size, int) and 0 <= size <= LARGEST_INPUT else b""
    return raw + bytes(-len(raw) % 32) + body


def _gguf_value(kind: Any, held: Any) -> bytes:
    if kind == 8:
        return _string(held)
    if kind == 9:
        if not (isinstance(held, list) and len(held) >= 2):
            return _packed("I", held) + _packed("Q", held)
        items = held[1] if isinstance(held[1], list) else [held[1]]
        count = held[2] if len(held) > 2 else len(items)
        return _packed("I", held[0]) + _packed("Q", count) + b"".join(_gguf_value(held[0], item) for item in items)
    return _packed(GGUF_SCALARS.get(kind, "I") if isinstance(kind, int) else "I", held)


def _string(text: Any) -> bytes:
    raw = str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _packed(form: str, held: Any) -> bytes:
    if form in "fd":
        try:
            return struct.pack(f"<{form}", float(held))
        except (TypeError, ValueError, OverflowError):
            return struct.pack(f"<{form}", 0.0)
    width = struct.calcsize(form)
    whole = int(held) if isinstance(held, int | float) and abs(held) < 1e40 else 0
    return (whole % 2 ** (8 * width)).to_bytes(width, "little")


def gguf_from(seed: bytes, rng: Random) -> bytes:
    """Seed: the JSON of a description. It is changed, written as GGUF, and sometimes changed again byte by byte."""
    description = json.loads(seed)
    if rng.random() < 0.9:
        changed = edit(description, rng)
        whole = isinstance(changed, dict) and changed.keys() >= description.keys()
        description = _mended(changed, description) if whole else description
    if rng.random() < 0.08:
        description["counts"] = [rng.choice((0, 3, 2**31, 2**60)), rng.choice((0, 9, 2**32))]
    raw = gguf_file(description)
    if rng.random() < 0.03:
        depth = rng.choice((50, 2000))
        arrays = struct.pack("<IQ", 9, 1) * depth
        raw = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _string("deep") + struct.pack("<I", 9) + arrays
    return bytes_of(raw, rng) if rng.random() < 0.3 else raw[:LARGEST_INPUT]


def _mended(changed: dict[str, Any], valid: dict[str, Any]) -> dict[str, Any]:
    """The description with entries of the right length, since the writer needs them."""
    tensors = [t for t in _list(changed["tensors"]) if isinstance(t, list) and len(t) == 4] or valid["tensors"]
    fields = [f for f in _list(changed["fields"]) if isinstance(f, list) and len(f) == 3] or valid["fields"]
    return {**changed, "tensors": tensors, "fields": fields}


def _list(held: Any) -> list[Any]:
    return held if isinstance(held, list) else []
