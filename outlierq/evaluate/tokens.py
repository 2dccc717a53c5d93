"""Whether two tokenizers are the same as far as a measurement goes: KL divergence compares their tokens one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.untrusted import brief
from outlierq.core.windows import opening_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHER_MODEL = "the two are no copies of one model, or one tokenizer was changed: compare it with the original's"


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase, text: str, what: tuple[str, str]
) -> None:
    """OutlierqError that names the first difference: in a token's id, in how a text begins, or in the ids of `text`.

    Tokens that only one of them has are no difference where the text does not use them: some are padded. what: the
    names of the two, for the message.
    """
    _check_vocabulary(tokenizer.get_vocab(), reference.get_vocab(), what)
    compared = [("beginning", opening_tokens(tokenizer), opening_tokens(reference))]
    program = _program(tokenizer)
    if program is None or program != _program(reference):  # one and the same reads every text alike, however long
        compared.append(("text", _ids(tokenizer, text), _ids(reference, text)))
    for where, ids, expected in compared:
        if ids != expected:
            place = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), None)
            place = min(len(ids), len(expected)) if place is None else place
            shown = [_token(t, i, place) for t, i in ((tokenizer, ids), (reference, expected))]
            raise OutlierqError(
                f"the tokenizers differ: token {place} of the {where} is {shown[0]} in {what[0]} and {shown[1]} in "
                f"{what[1]}",
                hint=OTHER_MODEL,
            )


def _check_vocabulary(known: dict[str, int], expected: dict[str, int], what: tuple[str, str]) -> None:
    """The same id for every token that both have."""
    differing = [token for token, number in known.items() if expected.get(token, number) != number]
    if differing:
        first = min(differing, key=known.__getitem__)
        raise OutlierqError(
            f"the tokenizers differ: {brief(repr(first))} has the id {known[first]} in {what[0]} and {expected[first]} "
            f"in {what[1]} ({len(differing):,} of {len(known):,} tokens have another id)",
            hint=OTHER_MODEL,
        )


def _program(tokenizer: PreTrainedTokenizerBase) -> tuple[type, bool, str] | None:
    """All that decides how a text becomes tokens; None for one that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend and (type(tokenizer), tokenizer.split_special_tokens, backend.to_str())


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text alone."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], place: int) -> str:
    """A token as a message shows it."""
    if place >= len(ids):
        return "missing"
    return f"{ids[place]} ({brief(repr(tokenizer.convert_ids_to_tokens(ids[place])))})"
