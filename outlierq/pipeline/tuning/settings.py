"""What a user asks of `outlierq tune`, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from outlierq.core.errors import ArgumentError
from outlierq.core.report import Report, Shown
from outlierq.recipe import Calibration

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
        kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in self.moved.items())
        return (
            f"{kinds} tuned in {self.steps} steps: KL on held-out text {self.before:.4g} -> {self.after:.4g} "
            f"({self.after / self.before - 1:+.1%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the report, which lies in the folder."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "report"}
