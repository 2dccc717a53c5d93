"""outlierq compresses LLM checkpoints: one command, a smaller checkpoint that serving stacks load, loss measured.

    import outlierq

    report = outlierq.quantize("./Llama-3.1-8B", "gptq-w4", out="./out")
    print(report.size.ratio, outlierq.evaluate("./out", reference="./Llama-3.1-8B").kl)

Names are imported when they are first asked for, so that importing outlierq costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from outlierq.api import (
        adapter,
        bench,
        calibrate,
        compare,
        convert,
        demo,
        detect,
        diff,
        evaluate,
        fit,
        frontier,
        inspect,
        open,
        plan,
        publish,
        quantize,
        read_recipe,
        recipe_text,
        recipes,
        recommend,
        report_page,
        study_caches,
        study_calibration,
        study_methods,
        study_write,
        sweep,
        tune,
        verify,
    )
    from outlierq.core.errors import GateError, OutlierqError
    from outlierq.core.limits import Limits
    from outlierq.core.measured.outliers import OutlierReport
    from outlierq.core.model import Checkpoint
    from outlierq.core.report import Evaluation, Report
    from outlierq.evaluate.comparison import Comparison
    from outlierq.pipeline.advising.recommend import Recommendation
    from outlierq.pipeline.asked.events import Event
    from outlierq.pipeline.diff import Difference
    from outlierq.pipeline.fitting.frontier import Frontier
    from outlierq.pipeline.fitting.space import Fitted
    from outlierq.pipeline.fitting.sweep import Sweep, SweepRow
    from outlierq.pipeline.planning.plan import Plan
    from outlierq.pipeline.verify import Verification
    from outlierq.recipe import Recipe

__all__ = [
    "Checkpoint",
    "Comparison",
    "Difference",
    "Evaluation",
    "Event",
    "Fitted",
    "Frontier",
    "GateError",
    "Limits",
    "OutlierReport",
    "OutlierqError",
    "Plan",
    "Recipe",
    "Recommendation",
    "Report",
    "Sweep",
    "SweepRow",
    "Verification",
    "adapter",
    "bench",
    "calibrate",
    "compare",
    "convert",
    "demo",
    "detect",
    "diff",
    "evaluate",
    "fit",
    "frontier",
    "inspect",
    "open",
    "plan",
    "publish",
    "quantize",
    "read_recipe",
    "recipe_text",
    "recipes",
    "recommend",
    "report_page",
    "study_caches",
    "study_calibration",
    "study_methods",
    "study_write",
    "sweep",
    "tune",
    "verify",
]

# What is not in `outlierq.api`.
_HOMES = {
    "Checkpoint": "core.model",
    "Comparison": "evaluate.comparison",
    "Difference": "pipeline.diff",
    "Evaluation": "core.report",
    "Event": "pipeline.asked.events",
    "Fitted": "pipeline.fitting.space",
    "Frontier": "pipeline.fitting.frontier",
    "GateError": "core.errors",
    "Limits": "core.limits",
    "OutlierReport": "core.measured.outliers",
    "OutlierqError": "core.errors",
    "Plan": "pipeline.planning.plan",
    "Recipe": "recipe",
    "Recommendation": "pipeline.advising.recommend",
    "Report": "core.report",
    "Sweep": "pipeline.fitting.sweep",
    "SweepRow": "pipeline.fitting.sweep",
    "Verification": "pipeline.verify",
}


class _Package(ModuleType):
    """This package. Four functions have the name of a stage, as `quantize`: the attribute is always the function.

    Importing `outlierq.quantize.gptq` would put the stage in its place. It can be imported as ever
    (`from outlierq.quantize import gptq`), but not spelled `outlierq.quantize.gptq` afterwards.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _version() -> str:
    """As it was installed, by its tag (setup.py); 0.dev0 for code that is run where it lies."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("outlierq")
    except PackageNotFoundError:
        return "0.dev0"


def __getattr__(name: str) -> Callable[..., Any] | type | str:
    """Import the module that defines a public name when it is first asked for (PEP 562)."""
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return [*__all__, "__version__"]
