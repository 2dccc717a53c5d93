"""`outlierq study methods`: every method that fits, on one model, one text and one set of statistics.

Quantizers and approximations see the same statistics of the same inputs, and their weights are put into a copy of the
model; whole recipes (those that change more than weights, or calibrate block by block) run as `outlierq quantize` does.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.approximation import Approximation
from outlierq.core.errors import ArgumentError, OutlierqError, during
from outlierq.core.model import Checkpoint, LinearSite
from outlierq.core.report import Shown
from outlierq.core.scheme import ActivationScheme, QuantScheme
from outlierq.load import open_checkpoint
from outlierq.pipeline.asked.events import Event, silent
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.detect import from_folder
from outlierq.pipeline.measuring import models
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.quantize import quantize
from outlierq.pipeline.studying.contenders import Contender, contenders
from outlierq.pipeline.studying.replaced import copied
from outlierq.pipeline.studying.replaced import replace as put_in
from outlierq.pipeline.studying.rounding import approximated, importance_of, method_of, options_by_block
from outlierq.pipeline.turning.made import turns_for
from outlierq.recipe import Calibration, load
from outlierq.registry import method

if TYPE_CHECKING:
    import torch

    from outlierq.core.stats import InputStats

INPUTS = {
    "16": None,
    "int8": ActivationScheme(bits=8),
    "int4": ActivationScheme(bits=4),
    "nvfp4": ActivationScheme("float", 4, False, "group", 16, "two-level"),
    "mxfp4": ActivationScheme("float", 4, True, "group", 32, "power-of-two"),
}
FLOATS = ("nvfp4", "mxfp4")  # weights are then of the same kind


@dataclass(frozen=True)
class MethodRow:
    """One method. bits: stored per weight, all that it needs. output_error: mean over linears, relative and squared.

    kl, perplexity: of the model on the text; None where it could not run, and `note` says why. against_gptq: its KL
    over that of gptq at as many bits, None outside of the bits at which gptq ran. cpu_seconds: of the method, with
    reading what it works on; of a recipe, of the whole run.
    """

    name: str
    paper: str
    loads_in: str
    bits: float | None = None
    output_error: float | None = None
    kl: float | None = None
    kl_standard_error: float | None = None
    perplexity: float | None = None
    against_gptq: float | None = None
    cpu_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class MethodStudy(Shown):
    """The table, and on what it was measured. yardstick: (bits, KL) of gptq with other groups and bits."""

    model: str
    statistics: str
    text: str
    tokens: int
    scheme: str
    reference_perplexity: float
    yardstick: tuple[tuple[float, float], ...]
    rows: tuple[MethodRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Conditions:
    """What all methods share. bits, group_size (None: per channel): of the weights. inputs: `16`, or `int8` or `int4`
    per token at run time; with `nvfp4` and `mxfp4` weights are of the same kind, in groups of its size.

    text: a file, None for the held-out part of the mix. window_length, windows: of it, None for all. general: other
    statistics of the model, of general text, for methods that weigh two texts.
    """

    bits: int = 4
    group_size: int | None = 128
    inputs: str = "16"
    text: str | None = None
    windows: int | None = 24
    window_length: int = 512
    general: Path | None = None

    def __post_init__(self) -> None:
        if self.inputs not in INPUTS:
            raise ArgumentError(f"{self.inputs!r}; choose {', '.join(INPUTS)}", argument="inputs")
        if self.inputs in FLOATS and self.bits != 4:
            raise ArgumentError(f"{self.inputs} has 4 bits, not {self.bits}; leave one of the two out", argument="bits")

    def texts(self, stats: Path, checkpoint: Checkpoint) -> list[Path]:
        """The statistics, and those of general text; StatsError where these are of another model."""
        if self.general is None:
            return [stats]
        from_folder(self.general, checkpoint)
        return [stats, self.general]

    @property
    def settings(self) -> list[str]:
        """The same as keys of a recipe."""
        asked = INPUTS[self.inputs]
        if asked is not None and self.inputs in FLOATS:
            dynamic = str(asked.dynamic).lower()
            inputs = f"{{kind: float, bits: 4, per: group, scales: {asked.scales}, dynamic: {dynamic}}}"
            keys = ["quantize.kind=float", "quantize.bits=4", f"quantize.group_size={asked.group_size}"]
            return [*keys, f"quantize.scales={asked.scales}", f"quantize.activations={inputs}"]
        keys = [f"quantize.bits={self.bits}", f"quantize.group_size={self.group_size or 'channel'}"]
        inputs = "null" if asked is None else f"{{kind: int, bits: {asked.bits}}}"
        return [*keys, f"quantize.activations={inputs}"]


USUAL_CONDITIONS = Conditions()


def study_methods(
    checkpoint: Checkpoint,
    stats: Path,
    conditions: Conditions = USUAL_CONDITIONS,
    *,
    only: Sequence[str] = (),
    resources: Resources = USUAL,
) -> MethodStudy:
    """Measure every contender. stats: of `outlierq calibrate`. only: names of contenders; empty for all.

    A method that cannot run on this model has a row that says why.
    """
    asked = contenders(only, conditions.bits, rounded_inputs=INPUTS[conditions.inputs] is not None)
    study = _Study(checkpoint, stats, conditions, resources)
    curve = study.yardstick()
    rows = []
    for number, contender in enumerate(asked):
        resources.listen(Event("study", number, len(asked), contender.name))
        rows.append(_against(study.row(contender), curve))
    resources.listen(Event("study", len(asked), len(asked)))
    return MethodStudy(
        model=checkpoint.source,
        statistics=study.statistics,
        text=study.text_name,
        tokens=study.windows.ids.numel(),
        scheme=study.scheme,
        reference_perplexity=study.reference_perplexity,
        yardstick=curve,
        rows=tuple(rows),
    )


def _against(row: MethodRow, curve: Sequence[tuple[float, float]]) -> MethodRow:
    """The row with its KL over that of gptq at as many bits, where gptq ran on both sides of them."""
    if row.kl is None or row.bits is None:
        return row
    below = [point for point in curve if point[0] <= row.bits + 1e-9]
    above = [point for point in curve if point[0] >= row.bits - 1e-9]
    if not below or not above:
        return row
    (low, first), (high, last) = below[-1], above[0]
    share = 0.0 if high <= low else (row.bits - low) / (high - low)
    rival = math.exp((1 - share) * math.log(first) + share * math.log(last))
    return replace(row, against_gptq=row.kl / rival)


@dataclass(frozen=True)
class _Made:
    """What a method made of all linears. bits, output_error: as in `MethodRow`. model: with it in place."""

    model: torch.nn.Module
    bits: float
    output_error: float
    cpu_seconds: float


class _Study:
    """One model, one text, one set of statistics, and every method asked in turn."""

    def __init__(self, checkpoint: Checkpoint, stats: Path, conditions: Conditions, resources: Resources):
        from outlierq.load import check_recorded, load_tokenizer, served

        check_recorded(checkpoint)
        self.checkpoint, self.stats, self.conditions, self.resources = checkpoint, stats, conditions, resources
        self.plain = served(checkpoint)
        self.statistics = from_folder(stats, checkpoint).description
        content, self.text_name = models.evaluation_text(conditions.text)
        length, windows = conditions.window_length, conditions.windows
        tokenizer = load_tokenizer(checkpoint)
        self.windows = models.checked_windows(checkpoint, tokenizer, content, window_length=length, windows=windows)
        self.schemes = self._schemes(conditions)
        self.scheme = " and ".join(sorted({str(scheme) for scheme in self.schemes.values()}))
        self.original = models.load_for_evaluation(checkpoint, device=resources.device)
        self.reference_perplexity = math.nan

    def _schemes(self, conditions: Conditions, settings: Sequence[str] = ()) -> Mapping[LinearSite, QuantScheme]:
        """Which linears are rounded, and how: as a recipe with these keys plans it."""
        return make_plan(self.checkpoint, load("gptq-w4", [*conditions.settings, *settings])).schemes

    def yardstick(self) -> tuple[tuple[float, float], ...]:
        """(bits, KL) of gptq with one bit less and one more, and with smaller groups, by rising bits; 4-bit floats have
        no such neighbours."""
        bits, group = self.conditions.bits, self.conditions.group_size
        if self.conditions.inputs in FLOATS:
            made = self._rounded(Contender("gptq", "gptq"), self.schemes)
            return ((made.bits, self._measured(made.model)["kl_per_token"]),)
        smaller = [128, 64, 32] if group is None else [size for size in (group // 2, group // 4) if size >= 8]
        others = [(bits - 1, group), (bits, group), *((bits, size) for size in smaller), (bits + 1, group)]
        points = []
        for bits, group in others:
            if not 2 <= bits <= 8:
                continue
            schemes = self._schemes(replace(self.conditions, bits=bits, group_size=group))
            made = self._rounded(Contender("gptq", "gptq"), schemes)
            points.append((made.bits, self._measured(made.model)["kl_per_token"]))
        return tuple(sorted(points))

    def row(self, contender: Contender) -> MethodRow:
        """What a contender makes of the model, and how far that is from the original."""
        row = MethodRow(contender.name, _paper(contender), contender.loads_in)
        if contender.integers and self.conditions.inputs in FLOATS:
            return replace(row, note="did not run: it rounds to integers only")
        try:
            with during("study", contender.name):
                made = self._of_recipe(contender) if contender.recipe else self._of_method(contender)
                measured = self._measured(made.model)
        except OutlierqError as error:
            return replace(row, note=f"did not run: {error.what}")
        return replace(
            row,
            bits=made.bits,
            output_error=made.output_error,
            kl=measured["kl_per_token"],
            kl_standard_error=measured["kl_standard_error"],
            perplexity=measured["perplexity"],
            cpu_seconds=made.cpu_seconds,
        )

    def _of_method(self, contender: Contender) -> _Made:
        """A method on the schemes of the study, or on its own."""
        own = self._schemes(self.conditions, contender.settings) if contender.settings else self.schemes
        return self._rounded(contender, own)

    def _measured(self, model: torch.nn.Module) -> dict[str, Any]:
        """Divergence of a model from the original."""
        measured = models.measure_windows(model, self.windows, reference=self.original).to_dict()
        self.reference_perplexity = measured["reference_perplexity"]
        return measured

    def _rounded(self, contender: Contender, schemes: Mapping[LinearSite, QuantScheme]) -> _Made:
        """Every linear that has a scheme and statistics, by one method."""
        asked, sums, seconds = method_of(contender), _Sums(), 0.0
        model = copied(self.original)
        options = options_by_block(contender, self.stats, self.checkpoint, schemes, self.plain)
        importance = importance_of(contender, self.conditions.texts(self.stats, self.checkpoint))
        for block in from_folder(self.stats, self.checkpoint).blocks:
            started = time.process_time()
            for parts, stack, stats in approximated(
                asked, block, schemes, self.plain, options[block.index], importance
            ):
                seconds += time.process_time() - started
                sums.add(parts, stack, stats)
                put_in(model, parts, INPUTS[self.conditions.inputs])
                started = time.process_time()
        return _Made(model, sums.bits, sums.output_error, seconds)

    def _of_recipe(self, contender: Contender) -> _Made:
        """A whole recipe, on these statistics where it can use some, else calibrated on their text."""
        recipe = load(contender.recipe, [*self.conditions.settings, *contender.settings])
        own = recipe.calibration or Calibration()
        runs = bool(recipe.rewrites) or own.runs
        if runs:
            recipe = recipe.model_copy(update={"calibration": self._calibration(own)})
        started = time.process_time()
        with tempfile.TemporaryDirectory(prefix="outlierq-study-") as folder:
            out = Path(folder, "out")
            turns = turns_for(self.checkpoint, recipe, out, resources=self._quietly)
            plan = make_plan(self.checkpoint, recipe, turns=turns)
            report = quantize(plan, out, stats=None if runs else self.stats, resources=self._quietly)
            seconds = time.process_time() - started
            model = models.load_for_evaluation(open_checkpoint(str(out)), device=self.resources.device)
        weights = [site.out_features * site.in_features for site in plan.schemes]
        bits = {row.site: row.bits_per_weight for row in report.rows}
        spent = sum(bits[site.module] * size for site, size in zip(plan.schemes, weights, strict=True))
        errors = [row.output_error for row in report.rows if row.output_error is not None]
        return _Made(model, spent / sum(weights), sum(errors) / len(errors), seconds)

    def _calibration(self, own: Calibration) -> Calibration:
        """The settings of the statistics, for a recipe that calibrates block by block."""
        from outlierq.calibrate.stored.stats_file import StatsReader

        settings = StatsReader(self.stats).calibration
        return Calibration(**{**settings, "mode": own.mode, "inputs": own.inputs})

    @property
    def _quietly(self) -> Resources:
        """The same resources, without a listener."""
        return replace(self.resources, listen=silent)


class _Sums:
    """Bits and output errors over linears."""

    def __init__(self) -> None:
        self._bits, self._weights, self._errors = 0.0, 0, list[float]()

    def add(self, parts: Mapping[LinearSite, Approximation], stack: torch.Tensor, stats: InputStats) -> None:
        """The members of a stack [out, in], and what became of them."""
        from outlierq.ops.errors import RelativeErrors

        rest = stack
        for made in parts.values():
            rows, rest = rest[: len(made.weight)], rest[len(made.weight) :]
            self._bits += made.bits * rows.numel()
            self._weights += rows.numel()
            errors = RelativeErrors()
            errors.add(rows, made.whole.clone(), stats.hessian)
            if errors.output is not None:
                self._errors.append(errors.output)

    @property
    def bits(self) -> float:
        """Per weight."""
        return self._bits / self._weights

    @property
    def output_error(self) -> float:
        """Mean over linears."""
        return sum(self._errors) / len(self._errors)


def _paper(contender: Contender) -> str:
    """Where the method comes from."""
    if contender.recipe:
        rounding = load(contender.recipe).quantize
        return "" if rounding is None else method("quantize", rounding.method).paper
    return method_of(contender).paper
