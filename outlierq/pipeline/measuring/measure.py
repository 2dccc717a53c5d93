"""One measurement of a checkpoint as one JSON value: figures, conditions, versions, and what a gate says of them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlierq import __version__
from outlierq.core.errors import ArgumentError, OutlierqError
from outlierq.core.limits import Limits
from outlierq.core.machine.installed import needs_extra
from outlierq.core.machine.own_files import write_atomically
from outlierq.core.machine.untrusted import json_object
from outlierq.core.model import Checkpoint
from outlierq.core.notes import collecting
from outlierq.core.report import REPORT_NAME, Evaluation, Report
from outlierq.export.writer import disk_error
from outlierq.load import SERVED_CACHES, check_unchanged
from outlierq.ops.caches.evaluated import EVALUATED
from outlierq.pipeline.asked.events import Listener
from outlierq.pipeline.asked.resources import USUAL, Resources
from outlierq.pipeline.measuring import models as evaluation
from outlierq.pipeline.measuring.cache import content_hash, data_hash, keep, key_of, recall
from outlierq.pipeline.measuring.packed_model import runtime_summary
from outlierq.pipeline.planning.plan import Plan
from outlierq.pipeline.remodel.rewrite import original_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from outlierq.recipe import Gate

RESULTS_VERSION = 1
PACKAGES = ("torch", "transformers")
LLAMA_CPP = "llama.cpp"
BACKENDS = ("transformers", "vllm", LLAMA_CPP)
RUNTIMES = ("dense", "packed")
# What both models continue, greedily, where somebody wants to see it; as a user's turn where there is a chat template.
PROMPTS = ("Write one sentence about the sea.", "The capital of France is", "Count from one to ten:")
NEW_TOKENS = 32
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Measurement:
    """What to measure, and how. Everything here is part of the result.

    text: as `evaluation_text` takes it. windows: None takes all. tasks: of lm-eval, on the model and,
    when there is one, on the original. backend: who answers the tasks, `transformers` (our own loader) or `vllm`;
    `llama.cpp` computes everything of a GGUF file. runtime: "packed" multiplies the model's packed weights as they are;
    the reference is always dense. bos: windows begin as the tokenizer begins a text. max_length: tokens of context in
    tasks, 0 for all of the model's positions. kv_cache: numbers in which a server keeps keys and values of the model,
    not of the reference; or a cache of the literature (`ops/caches`). generate: also what model and reference say to
    `PROMPTS`.
    """

    text: str | None = None
    windows: int | None = 24
    window_length: int = 512
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    dtype: str = "float32"
    backend: str = "transformers"
    runtime: str = "dense"
    bos: bool = True
    max_length: int | None = None
    kv_cache: str | None = None
    generate: bool = False

    def __post_init__(self) -> None:
        if self.kv_cache is not None:
            _one_of("kv_cache", self.kv_cache, (*SERVED_CACHES, *EVALUATED))
            if self.backend != "transformers":
                raise ArgumentError(f"{self.backend} has its own cache; leave one of the two out", argument="kv_cache")
        if self.generate and self.backend == LLAMA_CPP:
            raise ArgumentError(f"{LLAMA_CPP} is not asked to generate; leave one of the two out", argument="generate")
        _one_of("runtime", self.runtime, RUNTIMES)
        if self.runtime == "packed" and self.backend != "transformers":
            raise ArgumentError(f"{self.backend} has its own kernels; leave one of the two out", argument="runtime")
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("backend", self.backend, BACKENDS)
        if self.tasks:
            needs_extra("lm_eval")

    @classmethod
    def of_gate(cls, gate: Gate, *, data_dir: Path | None) -> Measurement:
        """What a gate needs to know."""
        return cls(
            text=gate.text,
            windows=gate.windows,
            window_length=gate.window_length,
            tasks=gate.limits.tasks,
            data_dir=data_dir,
            limit=gate.limit,
            num_fewshot=gate.num_fewshot,
            batch_size=gate.batch_size,
            dtype=gate.dtype,
        )


def _one_of(argument: str, value: str, known: Sequence[str]) -> None:
    """ArgumentError for a word that is not known."""
    if value not in known:
        words = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ArgumentError(f"{value!r}; choose {words}", argument=argument)


def measure(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    measurement: Measurement,
    *,
    cached: bool = True,
    resources: Resources = USUAL,
) -> Evaluation:
    """Perplexity, divergence from the reference and tasks, with everything that is needed to repeat them.

    cached: an earlier answer to the same question is taken; "from_cache" names what was not measured now.
    """
    content, text_name = evaluation.evaluation_text(measurement.text)
    model, original = _Side(checkpoint, measurement, resources.device), None
    if reference is not None:
        original = _Side(reference, replace(measurement, runtime="dense", kv_cache=None), resources.device)
    reused: list[str] = []
    uncached: list[str | None] = []

    def ask(name: str, settings: Mapping[str, Any], answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = key_of({"question": name.removeprefix("reference_"), **settings, "versions": versions()})
        if cached and (known := recall(key)) is not None:
            reused.append(name)
            return known
        measured = answer()
        for side in (checkpoint, reference):
            if side is not None:
                check_unchanged(side)
        uncached.append(keep(key, measured))
        return measured

    data = "hub" if measurement.data_dir is None or not measurement.tasks else data_hash(measurement.data_dir)
    text_hash = hashlib.sha256(content.encode()).hexdigest()
    windows = {"windows": measurement.windows, "window_length": measurement.window_length, "bos": measurement.bos}
    how = {"dtype": measurement.dtype, "device": _device_name(resources.device), "runtime": measurement.runtime}
    how |= {} if measurement.kv_cache is None else {"kv_cache": measurement.kv_cache}
    hashes = {"model": model.hash, "reference": original and original.hash}
    result = {
        "results_version": RESULTS_VERSION,
        "model": checkpoint.source,
        "reference": reference and reference.source,
        "content_hash": hashes,
        "text": text_name,
        "text_sha256": text_hash,
        **how,
        "conditions": _conditions(measurement, resources.device),
        "versions": versions(),
        "divergence": ask(
            "divergence",
            {**hashes, **windows, **how, "text": text_hash},
            lambda: _divergence(model, original, content, measurement, resources.listen),
        ),
    }
    if measurement.tasks:
        shared = {**how, **_task_options(measurement)}
        shared |= {"tasks": measurement.tasks, "data": data, "backend": measurement.backend}
        for name, side in (("tasks", model), ("reference_tasks", original)):
            if side is not None:
                result[name] = ask(name, {**shared, "model": side.hash}, partial(_tasks, side, measurement))
    if measurement.generate:
        said = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, **how, **hashes}
        result["samples"] = ask("samples", said, lambda: {"rows": _samples(model, original)})["rows"]
    notes = list(dict.fromkeys(filter(None, uncached)))
    return Evaluation(result | {"from_cache": reused} | ({"notes": notes} if notes else {}))


def check_measurement(checkpoint: Checkpoint, measurement: Measurement) -> None:
    """OutlierqError, before hours of work on `checkpoint`, for what would stop a measurement after them: a text, tasks
    or their data that are not there or do not fit the model."""
    content, _ = evaluation.evaluation_text(measurement.text)
    if measurement.tasks and measurement.data_dir is not None:
        data_hash(measurement.data_dir)
    _windows(_Side(checkpoint, measurement), None, content)


def judge(results: Mapping[str, Any], limits: Limits) -> Evaluation:
    """The results with what the gate says: "gate" holds the rows, "passed" the verdict (None without limits)."""
    from outlierq.evaluate.gate import check_gate

    rows = check_gate(results, limits)
    verdict = all(row.passed for row in rows) if rows else None
    return Evaluation({**results, "gate": [row.to_dict() for row in rows], "passed": verdict})


def with_command(results: Evaluation, command: str | None) -> Evaluation:
    """The results with the line that repeats them, where there is one."""
    return results if command is None else Evaluation({**results, "command": command})


def record(folder: Path, **measured: Any) -> Report:
    """Put what was measured into the report of a checkpoint that outlierq wrote, where `publish` finds it.

    measured: by field of the report.
    """
    report = replace(read_report(folder), **measured)
    try:
        write_atomically(folder / REPORT_NAME, (json.dumps(report.to_dict(), indent=1) + "\n").encode())
    except OSError as error:
        raise disk_error(error, folder / REPORT_NAME, 0) from error
    return report


def unmeasured(folder: Path, plan: Plan) -> Report | None:
    """The report of a run of this very plan that was finished, but stopped before its gate was measured; else None."""
    if not (folder / REPORT_NAME).is_file():
        return None
    report = read_report(folder)
    finished = report.fingerprint, report.settings, report.versions.get("outlierq"), report.evaluation
    planned = original_of(plan.checkpoint).fingerprint, plan.recipe.model_dump(mode="json"), __version__, None
    same_code = plan.recipe.outside_code.items() <= report.versions.items()
    return report if finished == planned and same_code else None


def read_report(folder: Path) -> Report:
    """The report beside a checkpoint that outlierq wrote; OutlierqError when there is none."""
    try:
        raw = (folder / REPORT_NAME).read_bytes()
    except FileNotFoundError:
        raise OutlierqError(
            f"{folder} has no {REPORT_NAME}: it is no result of `outlierq quantize`",
            hint="give the folder that `quantize -o` wrote",
        ) from None
    except OSError as error:
        raise OutlierqError(f"{folder / REPORT_NAME} cannot be read: {error}") from error
    return Report.from_dict(json_object(raw, f"{folder / REPORT_NAME}"))


class _Side:
    """A checkpoint that is hashed and loaded when it is needed, once."""

    def __init__(self, checkpoint: Checkpoint, measurement: Measurement, device: str = "cpu"):
        self.checkpoint, self.measurement, self.device = checkpoint, measurement, device

    @cached_property
    def hash(self) -> str:
        return content_hash(self.checkpoint)

    @cached_property
    def model(self) -> torch.nn.Module:
        measurement = self.measurement
        return evaluation.load_for_evaluation(
            self.checkpoint,
            dtype=measurement.dtype,
            device=self.device,
            runtime=measurement.runtime,
            kv_cache=measurement.kv_cache,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from outlierq.load import load_tokenizer

        return load_tokenizer(self.checkpoint)

    def says(self, prompt: str) -> str:
        """The most likely continuation of a prompt."""
        from outlierq.evaluate.generation import complete

        chat = self.tokenizer.chat_template is not None
        return complete(self.model, self.tokenizer, prompt, max_new_tokens=NEW_TOKENS, chat=chat).strip()


def _windows(side: _Side, original: _Side | None, content: str) -> evaluation.Windows:
    """The windows of a text; everything else that the measurement names is looked for, too."""
    measurement = side.measurement
    if measurement.tasks:
        evaluation.check_tasks(measurement.tasks, measurement.data_dir, measurement.num_fewshot)
    return evaluation.checked_windows(
        side.checkpoint,
        side.tokenizer,
        content,
        window_length=measurement.window_length,
        windows=measurement.windows,
        bos=measurement.bos,
        reference=None if original is None else (original.checkpoint, original.tokenizer),
    )


def _divergence(
    side: _Side, original: _Side | None, content: str, measurement: Measurement, listen: Listener
) -> dict[str, Any]:
    """`Divergence` as plain values; "linears" says how a packed model computed."""
    windows = _windows(side, original, content)
    with collecting() as notes:
        model = side.model
    reference = None if original is None else original.model
    measured = evaluation.measure_windows(model, windows, reference=reference, listen=listen).to_dict()
    if measurement.runtime == "packed":
        measured["linears"] = [*runtime_summary(model), *notes]
    return measured


def _samples(side: _Side, original: _Side | None) -> list[dict[str, str | None]]:
    """What both say to each prompt."""
    evaluation.check_continues(side.model, "--generate")
    return [
        {"prompt": prompt, "before": None if original is None else original.says(prompt), "after": side.says(prompt)}
        for prompt in PROMPTS
    ]


def _tasks(side: _Side, measurement: Measurement) -> dict[str, Any]:
    """The tasks of one side, asked in process or through vLLM."""
    from outlierq.evaluate.tasks import Served

    model: torch.nn.Module | Served
    tokenizer: PreTrainedTokenizerBase | None
    if measurement.backend == "vllm":
        folder = side.checkpoint.path
        if folder.is_file():
            raise OutlierqError(f"{folder} is one file; vLLM is given folders", hint="leave --backend out")
        model, tokenizer = Served(folder, side.checkpoint.trust_remote_code), None
    else:
        model, tokenizer = side.model, side.tokenizer
        evaluation.check_continues(model, "--tasks")
    return evaluation.run_tasks(
        model, tokenizer, measurement.tasks, data_dir=measurement.data_dir, **_task_options(measurement)
    )


def _task_options(measurement: Measurement) -> dict[str, Any]:
    """What is passed through to lm-eval."""
    return {name: getattr(measurement, name) for name in ("limit", "num_fewshot", "batch_size", "max_length")}


def _conditions(measurement: Measurement, device: str) -> dict[str, Any]:
    """Every setting, as plain values, in the order that reports have."""
    values = asdict(measurement)
    values |= {} if values.pop("generate") is False else {"generate": True}
    values |= {"data_dir": values["data_dir"] and str(values["data_dir"]), "tasks": list(measurement.tasks)}
    last = {"device": device, "backend": values.pop("backend"), "runtime": values.pop("runtime")}
    return values | last


def versions() -> dict[str, str]:
    """What the figures depend on beside the bytes."""
    versions = {"outlierq": __version__, "python": platform.python_version()}
    packages = [*PACKAGES, *(["lm-eval"] if find_spec("lm_eval") else [])]
    return versions | {package: version(package) for package in packages}


def _device_name(device: str) -> str:
    """The processor or GPU that computes."""
    if not device.startswith("cuda"):
        return f"cpu ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name(device)
