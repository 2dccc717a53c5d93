"""`outlierq tune`: from two checkpoints to a third one, that of the first with better scales, gains and biases."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq import __version__
from outlierq.core.errors import ArgumentError, SourceError, during
from outlierq.core.machine.record import signed
from outlierq.core.model import Checkpoint, StudiedModel
from outlierq.core.report import REPORT_NAME, Report, Shown, SiteRow
from outlierq.export.writer import write_small
from outlierq.load import check_recorded, lasting_stamps, report_beside
from outlierq.pipeline.asked.events import Event, Listener
from outlierq.pipeline.asked.request import Source
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.block.stats_run import token_set
from outlierq.pipeline.checking.finding import Findings
from outlierq.pipeline.checking.source.against import Comparison
from outlierq.pipeline.checking.weights import relative_error
from outlierq.pipeline.checking.written import check_written
from outlierq.pipeline.ledger.clock import Clock
from outlierq.pipeline.ledger.folder import finish, working
from outlierq.pipeline.ledger.journal import Journal
from outlierq.pipeline.tuning.kept import NAMES, KeptState
from outlierq.pipeline.tuning.moving import Moving, moving_of
from outlierq.pipeline.tuning.patched import work_files, write_patched
from outlierq.pipeline.tuning.report import first_report
from outlierq.pipeline.tuning.running import How, tunable
from outlierq.recipe import Calibration

if TYPE_CHECKING:
    import torch

    from outlierq.calibrate.text.windows import TokenSet
    from outlierq.quantize.tune import TuneState

TUNED = "+tune"  # behind the method of a weight
KINDS = ("scales", "norms", "biases")
LEAST_WINDOWS = 8  # one of eight is held out
BATCH_TOKENS = 1024  # that go through a block together
PASSES = 3  # through the text, where nothing is said
# The usual step beside the mean relative error of the weights: 1.5e-3 at 4 bits, 3e-3 at 3, 6e-3 at 2.
STEP_OF_ERROR = 0.015


@dataclass(frozen=True)
class TuneSettings:
    """text: of the windows, `samples` of `sequence_length` tokens. steps: each on `step_tokens`; None: PASSES times
    through the text. step_size: the largest relative step, None: by the error of the weights. kinds: what may move, of
    KINDS. dtype: in which blocks run.
    """

    text: str | None = None
    samples: int = 64
    sequence_length: int = 512
    steps: int | None = None
    step_tokens: int = 1024
    step_size: float | None = None
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    dtype: str = "float32"

    @property
    def batch_size(self) -> int:
        """Windows in a batch: so few that an eighth of all batches can be held out."""
        return max(1, min(BATCH_TOKENS // self.sequence_length, self.samples // LEAST_WINDOWS))

    @property
    def together(self) -> int:
        """Batches in a step."""
        return max(1, self.step_tokens // (self.batch_size * self.sequence_length))

    @property
    def step_count(self) -> int:
        """Steps in all."""
        batches = -(-self.samples // self.batch_size)
        return max(1, PASSES * batches * 7 // 8 // self.together) if self.steps is None else self.steps

    def check(self) -> None:
        """ArgumentError for what cannot be followed."""
        if self.samples < LEAST_WINDOWS:
            raise ArgumentError(
                f"{self.samples} windows are too few: one of {LEAST_WINDOWS} is held out", argument="samples"
            )
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong or not self.kinds:
            said = f"{wrong[0]!r}" if wrong else "nothing"
            raise ArgumentError(f"{said} cannot be tuned; choose of {', '.join(KINDS)}", argument="tune")
        if self.dtype not in ("float32", "bfloat16"):
            raise ArgumentError(f"{self.dtype!r}; choose float32 or bfloat16", argument="dtype")

    @property
    def calibration(self) -> Calibration:
        """The same words as those of a recipe."""
        words = {} if self.text is None else {"text": self.text}
        sizes = {"samples": self.samples, "sequence_length": self.sequence_length, "seed": self.seed}
        return Calibration.model_validate({**words, **sizes})


@dataclass(frozen=True)
class Tuned(Shown):
    """What tuning did. before, after: KL in nats per token on the held-out windows. improved: whether anything changed.

    steps: that were made. losses: KL on the text of each. judged: step -> KL on the held-out windows. moved: how many
    tensors of each kind could. notes: what could not be tuned, and why it stopped early where it did.
    """

    out: str
    before: float
    after: float
    improved: bool
    steps: int
    losses: tuple[float, ...]
    judged: dict[int, float]
    moved: dict[str, int]
    notes: tuple[str, ...]
    report: Report = field(repr=False)

    @property
    def summary(self) -> str:
        """What was done, in one sentence."""
        if not self.improved:
            return f"no step helped on held-out text (KL {self.before:.4g}): all bytes stay as they are"
        kinds = " and ".join(f"{count} tensors of {kind}s" for kind, count in self.moved.items())
        return (
            f"{kinds} tuned in {self.steps} steps: KL on held-out text {self.before:.4g} -> {self.after:.4g} "
            f"({self.after / self.before - 1:+.1%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the report, which lies in the folder."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "report"}


@dataclass(frozen=True)
class _Pair:
    """What is tuned, and what it was made of. comparison: how each weight of the two is held against the other."""

    stored: Checkpoint
    packed: StudiedModel
    original: StudiedModel
    report: Report | None
    comparison: Comparison
    moving: dict[str, Moving]
    notes: list[str]


def tune(
    source: Source,
    reference: Source,
    out: Path,
    settings: TuneSettings,
    *,
    restart: bool = False,
    resources: Resources = USUAL,
) -> Tuned:
    """Tune the checkpoint of `source` against the one that it was made of, and put the result at `out`.

    An interrupted run continues. SourceError, ArgumentError before any work for what cannot be tuned.
    """
    settings.check()
    with working(out, restart=restart) as work:
        clock = Clock()
        with clock("check"):
            pair = _pair(source, reference, frozenset(settings.kinds), resources.listen)
            tokens = token_set(pair.original, settings.calibration)
        settings = _with_step(settings, pair)
        journal = _journal(pair, tokens, settings, work, clock)
        how = How(settings.batch_size, settings.dtype, resources.device, work, resources.listen)
        with journal.told_of_stops():
            with clock("tune"):
                state = _state(pair, tokens, settings, how, journal)
            with clock("export"):
                report = _write(pair, tokens, settings, state, work, out)
                check_written(work, pair.stored)
            spent = dict(journal.seconds + clock.seconds)
            report = signed(replace(report, seconds=report.seconds | {"tune": sum(spent.values())}))
            write_small(work, {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()})
        finish(work, out, work_files(pair.stored, ()))
    moved = Counter(each.kind for each in pair.moving.values())
    return Tuned(
        str(out),
        state.first,
        state.least,
        state.improved,
        state.step,
        tuple(state.losses),
        state.judged,
        dict(moved),
        (*pair.notes, *([_stopped(state)] if state.trouble else [])),
        report,
    )


def _pair(source: Source, reference: Source, kinds: frozenset[str], listen: Listener) -> _Pair:
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
    return _Pair(stored, packed, studied, report, comparison, moving, notes)


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
    from outlierq.calibrate.text.windows import embedded_text
    from outlierq.evaluate.tokens import check_same_tokens
    from outlierq.load import load_tokenizer

    text = embedded_text("evaluation")[:2000]
    check_same_tokens(load_tokenizer(stored), load_tokenizer(original), text, (stored.source, original.source))


def _compared(packed: StudiedModel, original: Checkpoint, report: Report | None, listen: Listener) -> Comparison:
    """Hold every weight against the original. SourceError when one is no rounded form of what it was made from."""
    findings = Findings()
    plain = packed.checkpoint
    comparison = Comparison.of(plain, original, report, packed.names, findings)
    for number, name in enumerate(plain.packed):
        listen(Event("check", number, len(plain.packed), name))
        with during("check", name):
            quantized = plain.quantized(name) if name in plain.linears else None
            comparison.weight(name, plain.read(name).float(), quantized)
    comparison.finish()
    if findings.faults:
        fault = findings.faults[0]
        raise SourceError(
            f"{plain.source} was not made of {original.source}, or is damaged: {fault.tensor} {fault.what}",
            hint=f"`outlierq verify {plain.source} --source {original.source}` lists everything",
        )
    return comparison


def _with_step(settings: TuneSettings, pair: _Pair) -> TuneSettings:
    """The settings with a size of steps."""
    if settings.step_size is not None:
        return settings
    errors = list(pair.comparison.errors.values())
    return replace(settings, step_size=STEP_OF_ERROR * sum(errors) / max(1, len(errors)))


def _journal(pair: _Pair, tokens: TokenSet, settings: TuneSettings, work: Path, clock: Clock) -> Journal:
    """Of this run; OutputError when an unfinished one of another kind is there."""
    values = asdict(settings) | {"text": tokens.fingerprint, "kinds": list(settings.kinds)}
    identity = {
        "outlierq": __version__,
        "source": pair.stored.fingerprint,
        "reference": pair.original.checkpoint.fingerprint,
        "tuning": values,
    }
    about = {"model": pair.stored.source, "recipe": "tune", "units": settings.step_count}
    files = work_files(pair.stored, NAMES)
    return Journal(work, identity, clock.spent, about, files, lasting_stamps(pair.stored))


def _state(pair: _Pair, tokens: TokenSet, settings: TuneSettings, how: How, journal: Journal) -> TuneState:
    """Tune, and keep every step."""
    from outlierq.quantize import tune as method

    kept, steps = KeptState(how.work, journal), settings.step_count

    def told(state: TuneState) -> None:
        kept.keep(state)
        here = f"KL {state.losses[-1]:.4g}, " if state.losses else ""
        how.listen(Event("tune", state.step, steps, step=f"{here}held out {state.least:.4g} of {state.first:.4g}"))

    assert settings.step_size is not None, "it was chosen"
    with tunable(pair.original, pair.packed, pair.moving, tokens.ids, how) as model:
        return method.tune(
            model,
            steps=steps,
            together=settings.together,
            step_size=settings.step_size,
            seed=settings.seed,
            state=kept.last(model.start),
            told=told,
        )


def _write(pair: _Pair, tokens: TokenSet, settings: TuneSettings, state: TuneState, work: Path, out: Path) -> Report:
    """Write the checkpoint with the best changes; its report, which is not signed yet."""
    changes = state.best if state.improved else {}
    tensors = {name: pair.moving[name].stored(change) for name, change in changes.items()}
    files = write_patched(pair.stored, work, tensors)
    report = pair.report or first_report(pair.packed, pair.original, pair.comparison)
    record = dict(report.record or {})
    record.pop("units", None)  # of bytes that have changed
    record |= {"files": files, "tune": _said(pair, tokens, settings, state) | {"moved": _moved(pair, tensors)}}
    rows = tuple(_row(pair, row, changes) for row in report.rows) if changes else report.rows
    note = _sentence(tokens, state)
    return replace(
        report,
        out=str(out),
        rows=rows,
        notes=(*report.notes, note, *pair.notes),
        seeds=report.seeds | {"tune": settings.seed},
        evaluation=None,
        record=record,
    )


def _moved(pair: _Pair, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Of every tensor of any shape that is no part of a weight how far its numbers may have gone, in all tunings."""
    far = dict(pair.comparison.tuned)
    for name, tensor in tensors.items():
        if name in pair.packed.checkpoint.tensors:
            gone = (tensor.float() - pair.moving[name].values.float()).abs().max()
            far[name] = far.get(name, 0.0) + float(gone)
    return far


def _said(pair: _Pair, tokens: TokenSet, settings: TuneSettings, state: TuneState) -> dict[str, Any]:
    """What the record says of tuning."""
    values = asdict(settings) | {"kinds": list(settings.kinds), "text": tokens.description}
    kl = [state.first, state.least]
    return {"of": pair.stored.fingerprint, "settings": values, "steps": state.step, "kl": kl}


def _sentence(tokens: TokenSet, state: TuneState) -> str:
    """What tuning did."""
    if not state.improved:
        return (
            f"tuned on {tokens.description}, and no step helped on the held-out part (KL {state.first:.4g}): all bytes "
            f"stay{f'; {_stopped(state)}' if state.trouble else ''}"
        )
    return (
        f"tuned in {state.step} steps on {tokens.description}: KL on the held-out part {state.first:.4g} -> "
        f"{state.least:.4g}; output errors are not known any more"
    )


def _stopped(state: TuneState) -> str:
    """Why tuning ended early."""
    return f"tuning stopped after step {state.step}: {state.trouble}"


def _row(pair: _Pair, row: SiteRow, changes: Mapping[str, Any]) -> SiteRow:
    """The report's row of a weight, with the error that it has now."""
    name = pair.packed.names.get(f"{row.site}.weight", f"{row.site}.weight")
    linear = pair.packed.checkpoint.linears.get(name)
    member = None if linear is None else next((m for m in linear.members.values() if m in changes), None)
    if member is None:
        return row
    before = pair.packed.checkpoint.read(name).float()
    now = pair.moving[member].applied(before, changes[member])
    error = relative_error(now, pair.comparison.expected.read(name).float())
    method = f"{row.method.removesuffix(TUNED)}{TUNED}"
    return replace(row, method=method, output_error=None, weight_error=error)


__all__ = ["TuneSettings", "Tuned", "tune"]
