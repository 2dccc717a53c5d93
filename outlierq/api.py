"""What outlierq does, as functions: plain values in, values out. The commands only translate their options into these.

Nothing is printed unless `progress` asks for it. What a user can mend is an `OutlierqError` with a hint.

A model is a folder, a Hub id (owner/name), a GGUF file, or a checkpoint that `open` gave. A recipe is the name of a
shipped one, a path, its keys as a dict, or a `Recipe`. In all functions:

device: "auto" (a GPU when there is one), "cpu" or "cuda". max_memory: most that the process may hold, "4GiB"; what
cannot stay below it is refused before work starts. revision: branch, tag or commit of a Hub id. trust_remote_code: run
Python code that the checkpoint brings along. trust_methods: import the Python code that a recipe names as its method.
progress: True draws it, on a terminal or in a notebook; a function is told of every `Event`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import ArgumentError

if TYPE_CHECKING:
    from outlierq.core.limits import Limits
    from outlierq.core.report import Evaluation, Report
    from outlierq.pipeline.asked.request import SourceLike
    from outlierq.pipeline.events import Listener
    from outlierq.pipeline.planning.plan import Plan
    from outlierq.recipe import RecipeLike, Settings

Place = str | os.PathLike[str]


def plan(
    model: SourceLike,
    recipe: RecipeLike | None = None,
    *,
    settings: Settings = None,
    format: str | None = None,
    max_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    progress: bool | Listener | None = None,
) -> Plan:
    """What a recipe would do to a model: what each tensor becomes and why, the exact size; reads headers only.

    settings: keys of the recipe to override. format: what to write, instead of the recipe's `export.format`; alone,
    with a compressed model: whether that can be converted without loss, for which every weight is read.
    `plan.expected` holds memory and time; with `max_memory` `plan.savings` says what is done to stay below it.

    >>> plan = outlierq.plan(model, "gptq-w4", settings={"quantize.group_size": 32})
    >>> plan.output_bytes < plan.source_bytes
    True
    >>> plan.rows[0].treatment
    'int4 symmetric g32'
    """
    from outlierq.pipeline.asked.request import Source, request
    from outlierq.pipeline.plan import plan
    from outlierq.report.progress import listening

    asked = request(recipe, settings, format=format, trust_methods=trust_methods)
    with listening(progress) as listen:
        return plan(Source(model, revision, trust_remote_code), asked, max_memory=max_memory, listen=listen)


def quantize(
    model: SourceLike,
    recipe: RecipeLike | None = None,
    *,
    out: Place,
    settings: Settings = None,
    format: str | None = None,
    stats: Place | None = None,
    limits: Limits | None = None,
    data_dir: Place | None = None,
    junit: Place | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    revision: str | None = None,
    stream_from_hub: bool = False,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    restart: bool = False,
    progress: bool | Listener | None = None,
    planned: Callable[[Plan], Any] | None = None,
    command: str | None = None,
) -> Report:
    """Compress a model with a recipe (usually gptq-w4) and write a verified checkpoint to the folder `out`.

    An interrupted run continues where it stopped when it is called in the same way again; `restart` throws it away.
    settings: keys of the recipe to override. format: what to write, instead of the recipe's `export.format`; alone,
    with a compressed model: convert it without loss. stats: what `calibrate` wrote; then no forward pass runs.
    limits: of quality, instead of the recipe's `gate`; the result is measured beside the model then, and
    `report.evaluation.passed` says whether it kept them. data_dir: the data of the gate's tasks. junit: a file for
    what the gate says.
    stream_from_hub: fetch the weight files of a Hub id when they are needed and delete them again.
    planned: is given the plan before work starts; what it raises stops the run. command: recorded with the evaluation.

    >>> report = outlierq.quantize(model, "rtn-w4", out="w4", limits=outlierq.Limits(max_kl=1.0))
    >>> report.size.before > report.size.after
    True
    >>> report.evaluation.passed, report.evaluation.kl < 1.0
    (True, True)
    """
    from outlierq.pipeline.asked.request import FormatAlone, Source, refuse_unwritable, request
    from outlierq.pipeline.compress import Run, compress
    from outlierq.pipeline.resources import Resources
    from outlierq.report.progress import listening

    asked = request(recipe, settings, format=format, limits=limits, trust_methods=trust_methods)
    if junit is not None and (isinstance(asked, FormatAlone) or asked.gate is None):
        raise ArgumentError("there is no gate; give a limit such as --max-kl", argument="junit")
    refuse_unwritable(_path(junit))
    run = Run(_path(stats), _path(data_dir), restart, planned or (lambda plan: None), command)
    source = Source(model, revision, trust_remote_code, stream_from_hub)
    with listening(progress) as listen:
        report = compress(source, asked, out, run, Resources.of(device, max_memory, listen))
    if report.evaluation is not None and junit is not None:
        _write_junit(report.evaluation, Path(junit))
    return report


def convert(
    model: SourceLike,
    format: str,
    *,
    out: Place,
    revision: str | None = None,
    trust_remote_code: bool = False,
    restart: bool = False,
    progress: bool | Listener | None = None,
) -> Report:
    """Write the codes and scales of a compressed model in another format, without any loss, to the folder `out`.

    RecipeError or SourceError, before anything is written, when a number would change.

    >>> report = outlierq.convert(compressed, "gptq", out="as-gptq")
    >>> report.is_conversion
    True
    """
    from outlierq.pipeline.asked.request import Source, folder_of, known_format
    from outlierq.pipeline.convert import convert, make_conversion
    from outlierq.report.progress import listening

    with listening(progress) as listen:
        checkpoint = Source(model, revision, trust_remote_code).open()
        plan = make_conversion(checkpoint, known_format(format), listen=listen)
        return convert(plan, folder_of(out), restart=restart, listen=listen)


def evaluate(
    model: SourceLike,
    reference: SourceLike | None = None,
    *,
    tasks: Sequence[str] = (),
    data_dir: Place | None = None,
    text: Place | None = None,
    windows: int | None = 24,
    window_length: int = 512,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    backend: str = "transformers",
    runtime: str = "dense",
    dtype: str | None = None,
    limits: Limits | None = None,
    out: Place | None = None,
    junit: Place | None = None,
    record: bool = False,
    cached: bool = True,
    device: str = "auto",
    max_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
    command: str | None = None,
) -> Evaluation:
    """Perplexity of a model; with a `reference`, its original, also KL divergence per token, top-1 agreement and flips.

    text: a file, by default held-out text that is always there; the first `windows` of it (None takes all) of
    `window_length` tokens. tasks: of lm-eval, with `limit` samples each, `num_fewshot` examples in the prompt, and
    `batch_size` sequences at a time, their data from `data_dir` or the Hub; `backend` "vllm" lets vLLM answer them.
    runtime: "packed" multiplies the packed weights as they are stored. dtype: float32 (packed: bfloat16), or float16.
    limits: `.passed` says whether all were kept. out, junit: files for the result, and for what the limits say.
    record: put the result into the model's outlierq.json, where `publish` reads it. cached: take what was measured
    before. command: how to repeat it, a part of the result.

    >>> evaluation = outlierq.evaluate(compressed, reference=model, windows=2, window_length=64)
    >>> 0 <= evaluation.kl < 1, 0 < evaluation.top1 <= 1
    (True, True)
    >>> evaluation.perplexity > 1, evaluation.passed
    (True, None)
    """
    from outlierq.core.limits import Limits
    from outlierq.pipeline.asked.request import Source, refuse_unwritable, write_file
    from outlierq.pipeline.evaluate import Keeping, evaluate
    from outlierq.pipeline.measuring.measure import Measurement
    from outlierq.pipeline.resources import Resources
    from outlierq.report.progress import listening

    limits = limits or Limits()
    measurement = Measurement(
        text=None if text is None else os.fspath(text),
        windows=windows,
        window_length=window_length,
        tasks=tuple(dict.fromkeys([*tasks, *limits.tasks])),
        data_dir=_path(data_dir),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        dtype=dtype or ("bfloat16" if runtime == "packed" else "float32"),
        backend=backend,
        runtime=runtime,
    )
    refuse_unwritable(_path(out), _path(junit))
    original = None if reference is None else Source(reference, trust_remote_code=trust_remote_code)
    with listening(progress) as listen:
        found = evaluate(
            Source(model, revision, trust_remote_code),
            original,
            measurement,
            limits,
            keeping=Keeping(cached, record, command),
            resources=Resources.of(device, max_memory, listen),
        )
    if out is not None:
        write_file(Path(out), (json.dumps(found, indent=1) + "\n").encode())
    if junit is not None:
        _write_junit(found, Path(junit))
    return found


def _path(place: Place | None) -> Path | None:
    """A path, where there is one."""
    return None if place is None else Path(place)


def _write_junit(evaluation: Evaluation, path: Path) -> None:
    """What the gate says as JUnit XML, for CI servers."""
    from outlierq.pipeline.asked.request import write_file
    from outlierq.report.junit import junit_xml

    rows, seconds = evaluation.gate_rows, evaluation["divergence"]["seconds"]
    write_file(path, junit_xml(rows, evaluation["model"], seconds))
