"""Do tokenizer and chat template fit the model, and are they those of the source?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import SourceError
from outlierq.core.windows import embedding_rows
from outlierq.pipeline.checking.finding import Findings, listed

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

CHECK = "tokenizer"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
PROBE = "The quick brown fox, 12345 jumps:\n\tdef f(x): return x**2  # naïve — Ünïcödé 漢字 🙂\n"


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer does. ids: by token. special: ids by name. probe: the probe's ids, None where it was not cut.

    template: the chat template, None without one; several by name.
    """

    ids: Mapping[str, int]
    special: Mapping[str, int | None]
    template: Any
    probe: tuple[int, ...] | None


def check_tokens(checkpoint: Checkpoint, skeleton: Any, findings: Findings) -> Tokens | None:
    """Every id has a row in the embedding. Gives what the tokenizer does, None when none can be used."""
    rows = embedding_rows(skeleton)
    _check_ids(checkpoint.config, rows, findings)
    tokens = tokens_of(checkpoint, findings)
    if tokens is not None and rows is not None:
        last = max(tokens.ids.values(), default=0)
        if last >= rows:
            findings.fault(CHECK, "", f"has ids up to {last}, but the embedding has {rows} rows")
    return tokens


def tokens_of(checkpoint: Checkpoint, findings: Findings) -> Tokens | None:
    """The checkpoint's tokenizer; None with a note when it has none, with a fault when it cannot be loaded."""
    from outlierq.load import load_tokenizer, stored_tokens

    if checkpoint.kind == "gguf":
        stored = stored_tokens(checkpoint.path)
        if stored is None:
            findings.note("there is no tokenizer")
            return None
        ids, special, template = stored
        return Tokens(ids, special, template, probe=None)
    if not any(file.name in FILES for file in checkpoint.files):
        findings.note("there is no tokenizer")
        return None
    try:
        loaded = load_tokenizer(checkpoint)
    except SourceError as error:
        findings.fault(CHECK, "", error.what)
        return None
    special = {name: getattr(loaded, name, None) for name in SPECIAL}
    return Tokens(loaded.get_vocab(), special, loaded.chat_template or None, tuple(loaded(PROBE)["input_ids"]))


def compare_tokens(ours: Tokens | None, reference: Checkpoint, findings: Findings) -> None:
    """Vocabulary, special ids, chat template, and how a probe is cut, against the source's."""
    aside = Findings()
    theirs = tokens_of(reference, aside)
    if theirs is None:
        if aside.faults:
            findings.note(f"the source's tokenizer cannot be loaded, so it was not compared: {aside.faults[0].what}")
        return
    if ours is None:
        if not any(fault.check == CHECK for fault in findings.faults):
            findings.fault(CHECK, "", "there is none, though the source has one")
        return
    in_file = ours.probe is None or theirs.probe is None  # in the metadata of a file, where tables are padded
    moved = [token for token, number in theirs.ids.items() if ours.ids.get(token) != number]
    if moved or (not in_file and len(ours.ids) != len(theirs.ids)):
        first = f", first {moved[0]!r}" if moved else ""
        findings.fault(CHECK, "", f"{len(moved)} of {len(theirs.ids)} tokens have another id than in the source{first}")
    elif not in_file and ours.probe != theirs.probe:
        findings.fault(CHECK, "", "cuts a text into other tokens than that of the source")
    if ours.template != theirs.template:
        findings.fault(CHECK, "", "the chat template is not that of the source")
    known = [name for name in SPECIAL if not in_file or None not in (ours.special[name], theirs.special[name])]
    different = [name for name in known if ours.special[name] != theirs.special[name]]
    if different and not (in_file and different == ["pad_token_id"]):
        findings.fault(CHECK, "", f"other than in the source: {listed(different)}")


def _check_ids(config: Mapping[str, Any], rows: int | None, findings: Findings) -> None:
    """Special ids of the config must be rows of the embedding."""
    if rows is None:
        return
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    for part in parts:
        for key in SPECIAL:
            said = part.get(key)
            ids = said if isinstance(said, list) else [said]
            if any(isinstance(number, int) and number >= rows for number in ids):
                findings.fault("config", "", f"{key} is {said}, but the embedding has {rows} rows")
