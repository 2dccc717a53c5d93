"""The two checkpoints of a tuning: opened, held against each other, and refused where they do not belong together."""

from __future__ import annotations

from dataclasses import dataclass

from outlierq.core.errors import SourceError, during
from outlierq.core.model import Checkpoint, StudiedModel
from outlierq.core.quant_tensor import QuantTensor
from outlierq.core.report import Report
from outlierq.load import check_recorded, report_beside
from outlierq.pipeline.asked.events import Event, Listener
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.checking.codes import codes_of_rows
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.checking.source.against import Comparison
from outlierq.pipeline.tuning.moving import Moving, moving_of


@dataclass(frozen=True)
class Pair:
    """What is tuned, and what it was made of. comparison: how each weight of the two is held against the other."""

    stored: Checkpoint
    packed: StudiedModel
    original: StudiedModel
    report: Report | None
    comparison: Comparison
    moving: dict[str, Moving]
    notes: list[str]


def opened_pair(source: Source, reference: Source, kinds: frozenset[str], listen: Listener) -> Pair:
    """Open both, and see that they belong together and that something can move."""
    from outlierq.load import described, served, study, unpacked

    stored, original = source.open(), served(reference.open())
    if stored.kind != "huggingface":
        raise SourceError(
            f"{stored.source} is a GGUF file, whose scales are no real numbers",
            hint="tune a folder, and write the GGUF file anew from a recipe",
        )
    if not described(stored):
        raise SourceError(f"{stored.source} is not compressed", hint="compress it first: outlierq quantize")
    check_recorded(stored)
    plain = unpacked(stored)
    packed, studied = study(plain), study(original)
    _check_shapes(packed, studied)
    _check_tokens(stored, original)
    report = report_beside(stored.path)
    comparison = _compared(packed, original, report, listen)
    moving, notes = moving_of(packed, kinds)
    if not moving:
        raise SourceError(f"{stored.source} holds nothing that can be tuned ({'; '.join(notes) or 'by its headers'})")
    return Pair(stored, packed, studied, report, comparison, moving, notes)


def _check_shapes(packed: StudiedModel, original: StudiedModel) -> None:
    """SourceError when the two have no parameters of one shape under one name."""
    ours, theirs = packed.skeleton.state_dict(keep_vars=True), original.skeleton.state_dict(keep_vars=True)
    for name, parameter in theirs.items():
        if name in ours and ours[name].shape != parameter.shape:
            raise _other(packed, original, f"{name} is {list(ours[name].shape)}, there {list(parameter.shape)}")
    blocks = len(packed.structure.blocks), len(original.structure.blocks)
    if blocks[0] != blocks[1] or not ours.keys() & theirs.keys():
        raise _other(packed, original, f"it has {blocks[0]} blocks, there are {blocks[1]}")


def _other(packed: StudiedModel, original: StudiedModel, why: str) -> SourceError:
    """That the two do not belong together."""
    return SourceError(
        f"{packed.checkpoint.source} was not made of {original.checkpoint.source}: {why}",
        hint="give the original with --reference",
    )


def _check_tokens(stored: Checkpoint, original: Checkpoint) -> None:
    """OutlierqError when the two read a text as other tokens."""
    from outlierq.calibrate.text.embedded import embedded_text
    from outlierq.evaluate.tokens import check_same_tokens
    from outlierq.load import load_tokenizer

    text = embedded_text("evaluation")[:2000]
    check_same_tokens(load_tokenizer(stored), load_tokenizer(original), text, (stored.source, original.source))


def _codes(plain: Checkpoint, name: str) -> QuantTensor | None:
    """The codes of a packed weight [out, in]; None where they cannot be told."""
    try:
        return plain.quantized(name) if name in plain.linears else None
    except SourceError:
        return codes_of_rows(plain, name)


def _compared(packed: StudiedModel, original: Checkpoint, report: Report | None, listen: Listener) -> Comparison:
    """Hold every weight against the original. SourceError when one is no rounded form of what it was made from."""
    findings = Findings()
    plain = packed.checkpoint
    comparison = Comparison.of(plain, original, report, packed.names, findings)
    for number, name in enumerate(plain.packed):
        listen(Event("check", number, len(plain.packed), name))
        with during("check", name):
            comparison.weight(name, plain.read(name).float(), _codes(plain, name))
    comparison.finish()
    if findings.faults:
        fault = findings.faults[0]
        raise SourceError(
            f"{plain.source} was not made of {original.source}, or is damaged: {fault.tensor} {fault.what}",
            hint=f"`outlierq verify {plain.source} --source {original.source}` lists everything",
        )
    return comparison
