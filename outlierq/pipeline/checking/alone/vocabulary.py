"""Does a tokenizer agree with itself, and with the ids in the configs?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from outlierq.core.machine.untrusted import brief
from outlierq.pipeline.checking.alone.settings import file_of
from outlierq.pipeline.checking.finding import Findings, listed

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "tokenizer"
ROLES = ("bos", "eos", "pad", "unk")
TEXT, BYTE = 1, 6  # token types of GGUF that texts give
# Merges get ascending ids as they are learned: nearly all rise from one to the next.
FEWEST_MERGES, LEAST_RISING = 16, 1 / 8


@dataclass(frozen=True)
class Vocabulary:
    """ids: by token. special: ids that no text gives. named: id by role, as the tokenizer itself says."""

    ids: Mapping[str, int]
    special: frozenset[int]
    named: Mapping[str, int]


def check_vocabulary(checkpoint: Checkpoint, findings: Findings) -> None:
    """The tokenizer's own file, and what config.json and generation_config.json say of special tokens."""
    vocabulary = _of_gguf(checkpoint) if checkpoint.kind == "gguf" else _of_folder(checkpoint, findings)
    if vocabulary is None or not vocabulary.special:
        return
    configs = {
        "config.json": checkpoint.config,
        "generation_config.json": file_of(checkpoint, "generation_config.json"),
    }
    if checkpoint.kind == "gguf":
        configs = {"": {f"{role}_token_id": number for role, number in vocabulary.named.items()}}
    tokens = {number: token for token, number in vocabulary.ids.items()}
    for file, role, number in _said(configs):
        own = vocabulary.named.get(role)
        is_known = checkpoint.kind == "gguf" or (own is not None and own in vocabulary.special)
        if number in tokens and number not in vocabulary.special and is_known and role != "pad":
            what = f"{role}_token_id is {number}, which is the token {brief(tokens[number], 40)!r} of ordinary text"
            findings.fault("config", file, what)
    _check_named(vocabulary, checkpoint, tokens, findings)


def _said(configs: Mapping[str, Mapping[str, Any] | None]) -> Iterator[tuple[str, str, int]]:
    """(file, role, id) of each special token in the configs."""
    for file, config in configs.items():
        for role in ROLES:
            said = (config or {}).get(f"{role}_token_id")
            for number in said if isinstance(said, list) else [said]:
                if isinstance(number, int) and not isinstance(number, bool):
                    yield file, role, number


def _check_named(vocabulary: Vocabulary, checkpoint: Checkpoint, tokens: Mapping[int, str], findings: Findings) -> None:
    """A special token that the tokenizer names, but takes for ordinary text, where config.json has a special one."""
    for role, number in vocabulary.named.items():
        said = checkpoint.config.get(f"{role}_token_id")
        if number not in vocabulary.special and said in vocabulary.special and number != said:
            what = f"its {role}_token is {brief(tokens.get(number), 40)!r}, ordinary text; config.json says {said}"
            findings.fault(CHECK, "tokenizer_config.json", what)


def _of_gguf(checkpoint: Checkpoint) -> Vocabulary | None:
    """Out of the metadata of a file."""
    from outlierq.load import stored_token_types, stored_tokens

    stored = stored_tokens(checkpoint.path)
    if stored is None:
        return None
    ids, named, _ = stored
    special = frozenset(i for i, kind in enumerate(stored_token_types(checkpoint.path)) if kind not in (TEXT, BYTE))
    return Vocabulary(ids, special, {k.removesuffix("_token_id"): i for k, i in named.items() if i is not None})


def _of_folder(checkpoint: Checkpoint, findings: Findings) -> Vocabulary | None:
    """Out of tokenizer.json; None where there is none."""
    content = file_of(checkpoint, "tokenizer.json")
    settings = file_of(checkpoint, "tokenizer_config.json")
    names = {file.name for file in checkpoint.files}
    if content is None or not isinstance(content.get("model"), dict):
        if any(name.endswith("chat_template.jinja") for name in names) and not any(_makes_tokens(n) for n in names):
            findings.fault(CHECK, "chat_template.jinja", "is a chat template, but there is no tokenizer")
        return None
    model = content["model"]
    ids = _ids(model.get("vocab"))
    added = [each for each in content.get("added_tokens") or [] if isinstance(each, dict)]
    _check_added(ids, added, findings)
    _check_parts(content, findings)
    if not model.get("continuing_subword_prefix"):
        _check_merges(ids, model.get("merges"), findings)
    every = ids | {str(each.get("content")): each["id"] for each in added if isinstance(each.get("id"), int)}
    special = frozenset(each["id"] for each in added if isinstance(each.get("id"), int))
    named = {role: every[text] for role, text in _named(settings or {}) if text in every}
    return Vocabulary(every, special, named)


def _makes_tokens(name: str) -> bool:
    """Whether a file belongs to a tokenizer."""
    base = name.rpartition("/")[2]
    return base.startswith(("tokenizer", "vocab", "merges", "tekken", "spiece", "sentencepiece")) or base.endswith(
        (".model", ".tiktoken")
    )


def _ids(vocab: Any) -> dict[str, int]:
    """Id by token, of a mapping or of a list with scores."""
    if isinstance(vocab, list):
        return {str(each[0]): i for i, each in enumerate(vocab) if isinstance(each, list) and each}
    pairs = vocab.items() if isinstance(vocab, dict) else ()
    return {token: number for token, number in pairs if isinstance(number, int)}


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(role, token) that tokenizer_config.json names."""
    for role in ROLES:
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            yield role, token


def _check_added(ids: Mapping[str, int], added: list[dict[str, Any]], findings: Findings) -> None:
    """Added tokens have one id; no id has two tokens."""
    moved = [
        str(each["content"]) for each in added if ids.get(str(each.get("content")), each.get("id")) != each.get("id")
    ]
    if moved:
        findings.fault(
            CHECK,
            "tokenizer.json",
            f"{len(moved)} added tokens have another id in the vocabulary: {brief(listed(moved))}",
        )
    shared = len(ids) - len(set(ids.values()))
    if shared:
        findings.fault(CHECK, "tokenizer.json", f"{shared} ids belong to more than one token")


def _check_parts(content: Mapping[str, Any], findings: Findings) -> None:
    """Text is turned into the letters that stand for bytes where tokens are turned back from them, and the reverse."""
    before = "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("normalizer")])
    after = "ByteLevel" in json.dumps(content.get("decoder"))
    if before and not after:
        what = "it turns bytes into letters, but its decoder does not turn them back"
        findings.fault(CHECK, "tokenizer.json", what)
    if after and not before:
        findings.fault(
            CHECK, "tokenizer.json", "its decoder turns letters into bytes, but nothing turns bytes into letters"
        )


def _check_merges(ids: Mapping[str, int], merges: Any, findings: Findings) -> None:
    """Each merge makes a token, and ids ascend with ranks."""
    pairs = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in merges or []]
    made = [ids.get("".join(pair)) for pair in pairs if len(pair) == 2]
    lost = made.count(None)
    if lost:
        findings.fault(CHECK, "tokenizer.json", f"{lost} of {len(made)} merges make no token of the vocabulary")
    numbers = [number for number in made if number is not None]
    rising = sum(later > earlier for earlier, later in pairwise(numbers))
    if len(numbers) >= FEWEST_MERGES and rising < LEAST_RISING * len(numbers):
        findings.fault(CHECK, "tokenizer.json", f"the ids of its {len(numbers)} merges fall with their ranks")
