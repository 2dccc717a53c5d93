"""A checkpoint held against its source: weights as folds and rotations leave them, all else bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from outlierq.core.errors import RecipeError, SourceError
from outlierq.core.report import STORED
from outlierq.pipeline.checking.expected import Expected
from outlierq.pipeline.checking.finding import Findings, listed
from outlierq.pipeline.checking.guessed import Guess
from outlierq.pipeline.checking.plain import compare_plain
from outlierq.pipeline.checking.weights import grid_of, judge_weight
from outlierq.pipeline.remodel.rewrite import original_of, rewritten, served_source
from outlierq.pipeline.remodel.rewritten import RewrittenCheckpoint

if TYPE_CHECKING:
    import torch

    from outlierq.core.model import Checkpoint
    from outlierq.core.quant_tensor import QuantTensor
    from outlierq.core.report import Report

NEAREST = ("rtn", "stored", "int8_split")


@dataclass
class Comparison:
    """What is expected of a checkpoint. dense: names of weights that were quantized and are stored in 16 bits.

    methods: of each quantized weight, as far as a report says it. guess: judges the weights where no report says how
    they were folded; None where it does. errors: relative error of each weight that was judged.
    """

    plain: Checkpoint
    expected: Expected
    findings: Findings
    dense: list[str]
    methods: Mapping[str, str]
    guess: Guess | None
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
        made_of = reference if report is None else remade(reference, report)
        if report is not None and report.fingerprint != original_of(made_of).fingerprint:
            findings.note("the report names another source than this one (its fingerprint is another)")
        transforms = () if report is None else report.transforms
        expected = Expected(made_of, plain, transforms, findings)
        rows = {} if report is None else {row.site: row.method for row in report.rows}
        methods = {names.get(f"{site}.weight", f"{site}.weight"): method for site, method in rows.items()}
        dense = [name for name in methods if name in plain.tensors and name not in plain.packed]
        known = report is not None and all("trace" in row for row in transforms if row.get("fold"))
        guess = None if known else Guess(findings, may_be_folded=_gains_differ(plain, made_of))
        return cls(plain, expected, findings, dense, methods, guess)

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
        grid = grid_of(quantized, weight.shape[1], rounded=nearest)
        if self.guess is not None:
            self.errors[name] = self.guess.add(name, weight, source, grid)
            return
        self.errors[name] = judge_weight(name, weight, source, grid, self.findings)

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
        folded = [name for name in differing if name not in tables and _may_be_folded(self.plain, self.expected, name)]
        if folded:
            self.findings.note(
                f"{len(folded)} unquantized tensors differ from the source, as folds make them: {listed(folded)}"
            )
        self.findings.faults += [fault for fault in findings.faults if fault.tensor not in folded]


def remade(reference: Checkpoint, report: Report) -> Checkpoint:
    """The source with the rewrites of the report's recipe. RecipeError when the recipe is not known here, or does not
    fit the source.
    """
    from outlierq.recipe import Recipe

    try:
        recipe = Recipe.model_validate(report.settings)
    except ValueError as error:
        raise RecipeError(f"the recipe in the report is not known here: {error}") from error
    return rewritten(reference, recipe, experts=(report.record or {}).get("experts"))


def _computed(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors that a rewrite computes."""
    if not isinstance(checkpoint, RewrittenCheckpoint):
        return frozenset()
    return frozenset(checkpoint.rewrite.changes) | _computed(checkpoint.original)


def _gains_differ(plain: Checkpoint, reference: Checkpoint) -> bool:
    """Whether any vector differs from the source: folds show in gains and biases."""
    vectors = [name for name, info in plain.tensors.items() if len(info.shape) == 1 and name in reference.tensors]
    return any(_differs(plain, reference, name) for name in vectors)


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
