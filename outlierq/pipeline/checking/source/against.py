"""A checkpoint held against its source: weights as folds and rotations leave them, all else bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.report import STORED
from outlierq.pipeline.checking.finding import Findings, listed
from outlierq.pipeline.checking.plain import compare_plain
from outlierq.pipeline.checking.source.expected import Expected
from outlierq.pipeline.checking.source.guessed import Guess
from outlierq.pipeline.checking.source.inferred import inferred_folds
from outlierq.pipeline.checking.source.rotated import rotated_like
from outlierq.pipeline.checking.weights import grid_of, judge_weight, relative_error
from outlierq.pipeline.remodel.rewrite import original_of, rewritten, served_source
from outlierq.pipeline.remodel.rewritten import TURNS_NAME, RewrittenCheckpoint
from outlierq.registry import methods

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.report import Report

NEAREST = ("rtn", "stored", "int8_split")
# Largest difference of a weight's relative error from the recorded one, as a part of it: sums in another order give
# 4e-5, units in float16 2e-4; scales that are told from rounded weights 9 %, and 0.01.
SAME_ERROR, MOVED_ERROR, LEAST_ERROR = 8e-4, 0.25, 0.03
# The same where a format stores scales in another dtype than they were chosen in.
SAME_BUT_FOR_SCALES = 4e-3
# Relative error of weights rounded to bfloat16: 2^-9 at most, which adds to that of a type of many bits.
READ_AS_BFLOAT16 = 2e-3


@dataclass
class Comparison:
    """What is expected of a checkpoint. dense: names of weights that were quantized and are stored in 16 bits.

    methods, recorded: of each quantized weight its method and relative error, as far as a report says them. tuned: how
    far the numbers of a tensor went that was tuned afterwards. guess:
    judges the weights where no report says how they were folded; None where it does. aside: what repeating inferred
    folds found. errors: relative error of each weight that was judged.
    """

    plain: Checkpoint
    expected: Expected
    findings: Findings
    dense: list[str]
    methods: Mapping[str, str]
    recorded: Mapping[str, float]
    tuned: Mapping[str, float]
    guess: Guess | None
    aside: Findings = field(default_factory=Findings)
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plain: Checkpoint,
        reference: Checkpoint,
        report: Report | None,
        names: Mapping[str, str],
        findings: Findings,
    ) -> Comparison:
        """Of a decoded checkpoint and its source. names: parameter -> stored tensor. RecipeError or SourceError when
        the rewrites of the report's recipe do not fit the source.
        """
        made_of = rotated_like(plain, reference) if report is None else remade(reference, report, plain.path)
        is_other = report is not None and report.fingerprint != original_of(made_of).fingerprint
        if is_other:
            findings.note("the report names another source than this one (its fingerprint is another)")
        transforms = () if report is None else report.transforms
        known = report is not None and all("trace" in row for row in transforms if row.get("fold"))
        aside = findings if known else Findings()
        tuned = _tuned(report)
        is_folded = not known and _gains_differ(plain, made_of, tuned)
        is_split = any("outlier_columns" in linear.members for linear in plain.linears.values())
        if is_folded or (is_split and not known):
            transforms = tuple(inferred_folds(plain, made_of))
        expected = Expected(made_of, plain, transforms, aside)
        rows = () if report is None else report.rows
        by_name = {names.get(f"{row.site}.weight", f"{row.site}.weight"): row for row in rows}
        methods = {name: row.method for name, row in by_name.items()}
        recorded = {name: row.weight_error for name, row in by_name.items()} if known and not is_other else {}
        dense = [name for name in methods if name in plain.tensors and name not in plain.packed]
        guess = None if known else Guess(findings, may_be_folded=is_folded)
        return cls(plain, expected, findings, dense, methods, recorded, tuned, guess, aside)

    def weight(self, name: str, weight: torch.Tensor, quantized: QuantTensor | None) -> None:
        """Judge one quantized weight, float32 [out, in], and its codes where they are known."""
        if name not in self.expected:
            return
        source = self._source(name)
        if source.shape != weight.shape:
            self.findings.fault("source", name, f"is {list(weight.shape)}, in the source {list(source.shape)}")
            return
        moved = self.expected.is_moved(name)
        nearest = self.methods.get(name) in NEAREST and not moved
        grid = grid_of(quantized, weight.shape[1], rounded=nearest, moved=moved)
        if self.guess is not None:
            self.errors[name] = self.guess.add(name, weight, source, grid)
            return
        before, recorded = len(self.findings.faults), self.recorded.get(name)
        error = relative_error(weight, source)
        same = SAME_ERROR if self.plain.kind != "gguf" else _same_in_16_bits(recorded)
        if recorded is not None and not moved and abs(error - recorded) <= same * recorded:
            self.errors[name] = error  # as the run rounded it, however its method did that
            return
        self.errors[name] = error = judge_weight(name, weight, source, grid, self.findings)
        if recorded is not None and len(self.findings.faults) == before:
            check_error(name, error, recorded, MOVED_ERROR if moved else same, self.findings)

    def _source(self, name: str) -> torch.Tensor:
        """What a weight came from, float32: where its codes were taken over, all that they stand for, not what a
        16-bit number holds of it.
        """
        below = served_source(self.expected.reference)
        if self.methods.get(name) == STORED and below is not None and name in below.packed:
            return below.original.read(name).float()
        return self.expected.read(name).float()

    def finish(self) -> None:
        """Everything that was not quantized, and the weights that had to wait for it."""
        findings = Findings()
        differing = compare_plain(
            self.plain,
            self.expected,
            findings,
            computed=_computed(self.expected.reference),
            rounded=frozenset(self.dense),
            tuned=self.tuned,
        )
        if self.guess is None:
            self.findings.faults += findings.faults
            return
        tables = [name for name in differing if len(self.plain.tensors[name].shape) > 1]
        may_be_ordered = any("outlier_columns" in linear.members for linear in self.plain.linears.values())
        if not self.guess.judge(other_tables=bool(tables), may_be_ordered=may_be_ordered):
            if differing:
                self.findings.note(f"{len(differing)} unquantized tensors differ from the source: {listed(differing)}")
            return
        folded: list[str] = []
        if self.guess.is_fitted:
            folded = [n for n in differing if n not in tables and _may_be_folded(self.plain, self.expected, n)]
        else:
            self.findings.faults += self.aside.faults
        moved = [name for name in folded or self.expected.moved if len(self.plain.tensors[name].shape) == 1]
        if moved:
            self.findings.note(
                f"{len(moved)} unquantized tensors differ from the source, as folds make them: {listed(moved)}"
            )
        self.findings.faults += [fault for fault in findings.faults if fault.tensor not in folded]


def check_error(name: str, error: float, recorded: float, allowed: float, findings: Findings) -> None:
    """The error of a weight against the one that the run measured before it wrote anything."""
    least = LEAST_ERROR if allowed == MOVED_ERROR else 0.0
    if abs(error - recorded) > allowed * max(error, recorded) + least:
        what = f"its relative error is {error:.5g}, the report says {recorded:.5g}: not all is stored as it was rounded"
        findings.fault("source", name, what)


def remade(reference: Checkpoint, report: Report, place: Path) -> Checkpoint:
    """The source with the rewrites of the report's recipe. RecipeError when the recipe is not known here, or does not
    fit the source. place: the folder of the result, which keeps what a rewrite was given to see.
    """
    from outlierq.recipe import Recipe

    try:
        recipe = Recipe.model_validate(report.settings)
    except ValueError as error:
        raise RecipeError(f"the recipe in the report is not known here: {error}") from error
    file = place / TURNS_NAME
    if recipe.turning and not file.is_file():
        raise RecipeError(
            f"{TURNS_NAME} is not beside the weights, which says how {recipe.turning[0].method} turned them"
        )
    turns = file if recipe.turning else None
    return rewritten(reference, recipe, experts=(report.record or {}).get("experts"), turns=turns)


def lost_turns(plain: Checkpoint, report: Report | None) -> str:
    """Why nobody can tell how a GGUF file was turned, empty where it was not: nothing is kept beside such a file."""
    steps = () if report is None or plain.path.is_dir() else report.settings.get("transform", ())
    turners = [name for name in (step.get("method") for step in steps) if name in methods("turn")]
    return f"{turners[0]} turned them by what it saw of the model, which no GGUF file keeps" if turners else ""


def _computed(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors that a rewrite computes."""
    if not isinstance(checkpoint, RewrittenCheckpoint):
        return frozenset()
    return frozenset(checkpoint.rewrite.changes) | _computed(checkpoint.original)


def _same_in_16_bits(recorded: float | None) -> float:
    """By how much of itself the error of a weight of a GGUF file, which is read as bfloat16, may differ."""
    if not recorded:
        return SAME_BUT_FOR_SCALES
    return SAME_BUT_FOR_SCALES + math.hypot(recorded, READ_AS_BFLOAT16) / recorded - 1


def _tuned(report: Report | None) -> Mapping[str, float]:
    """How far `outlierq tune` moved the numbers of tensors that are no weights, by name, as the record says."""
    said = ((report.record or {}).get("tune") or {}).get("moved") if report else None
    return {name: float(far) for name, far in said.items()} if isinstance(said, Mapping) else {}


def _gains_differ(plain: Checkpoint, reference: Checkpoint, tuned: Mapping[str, float]) -> bool:
    """Whether any vector differs from the source that was not tuned: folds show in gains and biases."""
    vectors = [name for name, info in plain.tensors.items() if len(info.shape) == 1 and name in reference.tensors]
    return any(_differs(plain, reference, name) for name in vectors if name not in tuned)


def _differs(plain: Checkpoint, reference: Checkpoint, name: str) -> bool:
    import torch

    one, other = plain.read(name), reference.read(name)
    return one.shape == other.shape and not torch.equal(one.to(other.dtype), other)


def _may_be_folded(plain: Checkpoint, expected: Expected, name: str) -> bool:
    """Whether positive scales can have made a gain of the source's; biases may be shifted, too."""
    try:
        one, other = plain.read(name).float(), expected.read(name).float()
    except SourceError:
        return False
    return one.shape == other.shape and (name.endswith("bias") or bool((one.sign() == other.sign()).all()))
