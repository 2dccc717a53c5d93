"""`outlierq study calibration`: how much it matters for a model on which text it is calibrated.

One calibration a text, and every linear quantized from each of them and judged on all others (Paglieri et al. 2024,
arXiv:2405.20835, whose nonsense text is one of ours).
"""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import ArgumentError
from outlierq.core.model import Checkpoint, LinearSite
from outlierq.core.report import Shown
from outlierq.core.scheme import QuantScheme
from outlierq.pipeline.asked.events import Event, silent
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.calibrate import calibrate
from outlierq.pipeline.detect import BlockData, from_folder
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.studying.stacks import stacked, stacks
from outlierq.recipe import load
from outlierq.recipe.sections import Calibration, TextSource
from outlierq.registry import method

if TYPE_CHECKING:
    from outlierq.core.model import TensorSource
    from outlierq.core.stats import InputStats

NONSENSE = "nonsense"
NONSENSE_CHARACTERS = 1 << 18
# Verdict: weights rounded for one text lose so much more on another, or texts share so few outlier channels.
SENSITIVE_ERROR, SENSITIVE_OUTLIERS = 1.25, 0.5
FIELDS = frozenset({"hessian", "min", "max", "sum_sq", "first_rows"})
MEASURES = ("rank_correlation", "shared_outliers", "scale_ratio", "energy_cosine")
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CalibrationStudy(Shown):
    """What the texts make of the model; every matrix is [texts, texts], medians over its inputs or linears.

    error: output error on the text of the column of weights rounded on that of the row, over that of weights rounded on
    the column's own. agreement: by measure of `detect.inputs.agreement`. sensitive, verdict: what follows, in words.
    """

    model: str
    texts: tuple[str, ...]
    tokens: int
    scheme: str
    error: Matrix
    agreement: dict[str, Matrix]
    sensitive: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def study_calibration(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    settings: Calibration,
    *,
    quantizer: Sequence[str] = (),
    resources: Resources = USUAL,
) -> CalibrationStudy:
    """Calibrate on every text and compare. texts: files, `mix`, `embedded`, or `nonsense`; at least two.

    settings: how many windows of which length. quantizer: keys of the recipe gptq-w4 to override. ArgumentError for
    fewer texts.
    """
    from outlierq.load import served

    if len(texts) < 2:
        raise ArgumentError("one text has nothing to be compared with; give at least two", argument="text")
    schemes = make_plan(checkpoint, load("gptq-w4", list(quantizer))).schemes
    pairs = _Pairs(len(texts))
    with tempfile.TemporaryDirectory(prefix="outlierq-study-") as folder:
        folders = [Path(folder, str(number)) for number in range(len(texts))]
        for number, (text, place) in enumerate(zip(texts, folders, strict=True)):
            resources.listen(Event("study", number, len(texts) + 1, f"calibrating on {Path(text).name}"))
            _calibrate(checkpoint, text, settings, place, resources)
        resources.listen(Event("study", len(texts), len(texts) + 1, "comparing"))
        statistics = [from_folder(place, checkpoint).blocks for place in folders]
        for blocks in zip(*statistics, strict=True):
            pairs.add(blocks, schemes, served(checkpoint))
    resources.listen(Event("study", len(texts) + 1, len(texts) + 1))
    agreement = {name: pairs.medians(name) for name in MEASURES}
    error = pairs.medians("error")
    return CalibrationStudy(
        model=checkpoint.source,
        texts=tuple(texts),
        tokens=settings.samples * settings.sequence_length,
        scheme=" and ".join(sorted({str(scheme) for scheme in schemes.values()})),
        error=error,
        agreement=agreement,
        **_verdict(texts, error, agreement["shared_outliers"]),
    )


def _calibrate(checkpoint: Checkpoint, text: str, settings: Calibration, out: Path, resources: Resources) -> None:
    """Statistics of one text in the folder `out`: what the comparison reads of them."""
    path = text
    if text == NONSENSE:
        path = str(out.with_suffix(".txt"))
        Path(path).write_text(nonsense(), encoding="utf-8")
    own = settings.model_copy(update={"text": (TextSource(path=path),)})
    quiet = Resources(resources.device, listen=silent)
    calibrate(checkpoint, own, out, only=FIELDS, resources=quiet)


def nonsense(characters: int = NONSENSE_CHARACTERS) -> str:
    """Letters, digits and punctuation without any sense, always the same."""
    signs = string.ascii_letters + string.digits + string.punctuation + " " * 12
    return "".join(random.Random(0).choices(signs, k=characters))


class _Pairs:
    """Figures of every ordered pair of texts, one for each linear or input."""

    def __init__(self, texts: int):
        self._texts = range(texts)
        self._values: dict[tuple[str, int, int], list[float]] = {}

    def add(self, blocks: Sequence[BlockData], schemes: Mapping[LinearSite, QuantScheme], source: TensorSource) -> None:
        """One block, with its statistics from every text."""
        found = [{name: (members, stats) for members, name, stats in stacks(block, schemes)} for block in blocks]
        for name in found[0]:
            if all(name in each for each in found):  # an expert may get no token of a text
                known = [each[name][1] for each in found]
                self._add_agreement(known)
                self._add_errors(found[0][name][0], known, schemes, source)

    def _add_agreement(self, known: Sequence[InputStats]) -> None:
        """The statistics of one input from every text."""
        from outlierq.detect.inputs import agreement

        for i in self._texts:
            for j in self._texts:
                for name in MEASURES:
                    self._add(name, i, j, getattr(agreement, name)(known[i], known[j]))

    def _add_errors(
        self,
        members: Sequence[LinearSite],
        known: Sequence[InputStats],
        schemes: Mapping[LinearSite, QuantScheme],
        source: TensorSource,
    ) -> None:
        """A stack rounded on every text, judged on every text, by what one rounded on that text loses."""
        from outlierq.ops.errors import output_error

        w = stacked(members, source)
        round_ = method("quantize", "gptq").function
        changes = [round_(w, stats, schemes[members[0]]).dequantize() - w for stats in known]
        lost = [[output_error(change, stats.need("hessian")).item() for stats in known] for change in changes]
        for i in self._texts:
            for j in self._texts:
                self._add("error", i, j, lost[i][j] / lost[j][j] if lost[j][j] > 0 else 1.0)

    def _add(self, name: str, i: int, j: int, value: float) -> None:
        self._values.setdefault((name, i, j), []).append(value)

    def medians(self, name: str) -> Matrix:
        """[texts, texts] of a figure."""
        return tuple(tuple(median(self._values[name, i, j]) for j in self._texts) for i in self._texts)


def _verdict(texts: Sequence[str], error: Matrix, shared: Matrix) -> dict[str, Any]:
    """Whether the text matters, and what follows, in words. Nonsense only counts where there are no two other texts."""
    sound = [i for i, text in enumerate(texts) if text != NONSENSE]
    judged = sound if len(sound) > 1 else range(len(texts))
    apart = [(i, j) for i in judged for j in judged if i != j]
    worst = max(apart, key=lambda pair: error[pair[0]][pair[1]])
    middle = median(error[i][j] for i, j in apart)
    least = min(shared[i][j] for i, j in apart)
    sensitive = middle > SENSITIVE_ERROR or least < SENSITIVE_OUTLIERS
    said = (
        f"weights rounded on another text lose {middle:.2f} times what they lose on their own (at most "
        f"{error[worst[0]][worst[1]]:.2f}: rounded on {texts[worst[0]]}, judged on {texts[worst[1]]}); texts share at "
        f"least {least:.0%} of their outlier channels. "
    )
    advice = (
        "The text matters: calibrate on text like that of your users, on more of it, and prefer inputs with a scale "
        "per token."
        if sensitive
        else "The text hardly matters."
    )
    return {"sensitive": sensitive, "verdict": said + advice}
