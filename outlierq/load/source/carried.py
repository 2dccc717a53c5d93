"""What travels with a checkpoint's weights: the one list of files that are carried into a result and published.

Everything else in a folder stays where it is, and is named: folders of training runs hold keys, tokens, states of
optimizers and notes. A file of the list stays behind, too, when it holds what looks like a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
# Where transformers keeps the chat templates of a tokenizer that has several.
TEMPLATES = "additional_chat_templates"
TEMPLATE_FILES = f"{TEMPLATES}/*.jinja"

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "merges.txt",
    "*.model",  # SentencePiece
    "*.tiktoken",
)
CHAT = ("chat_template*.jinja", "chat_template*.json", TEMPLATE_FILES)
SETTINGS = (
    "generation_config.json",
    "*processor_config.json",
    "*feature_extractor_config.json",
    "quantize_config.json",
)
PAPERS = ("licen[sc]e*", "notice*", "use_policy*", "copying*", "readme*", "model_card*.md")
# What `outlierq` itself puts beside weights.
REPORTS = ("outlierq.json", "outlierq.turns", "outliers.json", "outliers.html", "outliers-*.png")
CARRIED = (*TOKENIZER, *CHAT, *SETTINGS, *PAPERS, *REPORTS)

# Vocabularies hold any text, and no tokenizer works without them.
NOT_SEARCHED = ("tokenizer.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.png")
SEARCHED_BYTES = 1 << 24
SECRETS = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{32,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{40,}|\bxox[abprs]-[A-Za-z0-9-]{20,}"
)

# Of JSON files: where they lay on the machine that wrote them.
PLACES = ("_name_or_path", "name_or_path", "tokenizer_file")


def is_carried(name: str, code: Collection[str] = ()) -> bool:
    """Whether a file with this name, as it is spelled in the folder, travels. code: files with the model's own code."""
    lower = name.lower()
    patterns = (pattern for pattern in CARRIED if pattern.count("/") == name.count("/"))
    return name in code or any(fnmatchcase(lower, pattern) for pattern in patterns)


def carried_names(folder: Path) -> list[str]:
    """Names below the folder of the files that travel with its weights, without config.json."""
    names = names_in(folder)
    code = code_in(folder, names)
    return [name for name in names if is_carried(name, code) and not secret_in(folder / name)]


def left_behind(folder: Path, ours: Collection[str]) -> tuple[str, ...]:
    """What else lies in the folder, hidden files left out; folders with a slash. ours: weights and their index."""
    carried = set(carried_names(folder))
    names = [*names_in(folder), *(f"{path.name}/" for path in folder.iterdir() if path.is_dir())]
    others = (name for name in names if name not in {*carried, *ours, f"{TEMPLATES}/"} and not name.startswith("."))
    code = code_in(folder, names)
    return tuple(sorted(f"{n} (it holds what looks like a secret)" if is_carried(n, code) else n for n in others))


def names_in(folder: Path) -> list[str]:
    """Every plain file at the top of a folder and its chat templates, by their names below it; hidden ones left out."""
    files = [*folder.iterdir(), *((folder / TEMPLATES).iterdir() if (folder / TEMPLATES).is_dir() else ())]
    names = [str(path.relative_to(folder)) for path in files if path.is_file() and not path.name.startswith(".")]
    return sorted(names)


def code_in(folder: Path, names: Collection[str]) -> set[str]:
    """The Python files that an `auto_map` of the folder refers to, and those that these import."""
    waiting = {f"{module}.py" for name in names if name.endswith(".json") for module in _modules(folder / name)}
    code: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in names and name not in code:
            code.add(name)
            waiting |= {f"{module}.py" for module in _imported(folder / name)}
    return code


def _modules(path: Path) -> Iterator[str]:
    """Modules beside a JSON file that its `auto_map` names; those of another repository are not meant."""
    if not fnmatchcase(path.name, "*config.json"):
        return
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # whoever reads the file says what is wrong with it
    said = values.get("auto_map") if isinstance(values, dict) else None
    for value in said.values() if isinstance(said, dict) else ():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "--" not in each and "." in each:
                yield each.split(".")[0]


def _imported(path: Path) -> set[str]:
    """Modules that a Python file imports from beside it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    listed = re.findall(r"^\s*from\s+\.\s+import\s+([\w, ]+)", text, re.MULTILINE)
    return {*re.findall(r"^\s*from\s+\.(\w+)", text, re.MULTILINE), *re.findall(r"\w+", " ".join(listed))}


def secret_in(path: Path) -> bool:
    """Whether a file, but for vocabularies, holds what looks like a key or a token."""
    if any(fnmatchcase(path.name, pattern) for pattern in NOT_SEARCHED):
        return False
    with path.open("rb") as file:
        return bool(SECRETS.search(file.read(SEARCHED_BYTES)))


def without_places(values: T) -> T:
    """The values of a JSON file, without where it lay on the machine that wrote it, at any depth."""
    if isinstance(values, dict):
        return {key: without_places(value) for key, value in values.items() if key not in PLACES}
    return [without_places(value) for value in values] if isinstance(values, list) else values
