"""Measure a checkpoint: perplexity, divergence from its original, named tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

BACKENDS = ("transformers", "vllm")
RUNTIMES = ("dense", "packed")
EXAMPLES = (
    "Examples:\n\n"
    "  outlierq eval ./SmolLM2-135M-W4 --reference ./SmolLM2-135M\n\n"
    "  outlierq eval ./out --reference ./original --text wiki.test.raw --windows 64 --max-kl 0.05\n\n"
    "  outlierq eval ./out --runtime packed\n\n"
    "  outlierq eval ./out --tasks wikitext,mmlu --data-dir ./data --limit 20\n\n"
    "  outlierq eval ./out --reference ./original --tasks mmlu --min-task mmlu:-1.0 -o results.json --junit gate.xml"
)


def command(
    model: shared.Model,
    reference: Annotated[
        str | None, typer.Option(help="The original, for KL, top-1 agreement, flips, and the tasks before and after.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas: wikitext,mmlu.")] = None,
    data_dir: shared.DataDir = None,
    text: Annotated[str | None, typer.Option(help="Text file to measure on; default: held-out embedded text.")] = None,
    windows: Annotated[int, typer.Option(min=0, help="Number of windows of the text; 0 takes all.")] = 24,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in tasks.")] = 1,
    backend: Annotated[
        str, typer.Option(help="Who answers the tasks: transformers (outlierq loads the model) or vllm.")
    ] = "transformers",
    runtime: Annotated[
        str, typer.Option(help="How MODEL computes: dense (weights decoded first) or packed (multiplied as stored).")
    ] = "dense",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: float32, with --runtime packed bfloat16."),
    ] = None,
    max_kl: shared.MaxKl = None,
    max_perplexity_increase: shared.MaxPerplexityIncrease = None,
    min_top1: shared.MinTop1 = None,
    min_task: shared.MinTask = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the results as JSON.")] = None,
    junit: shared.Junit = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the results in MODEL's outlierq.json, where `publish` reads them.")
    ] = False,
    no_cache: shared.NoCache = False,
    device: shared.Device = "auto",
    max_memory: shared.MaxMemory = None,
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Perplexity of MODEL; with --reference also KL divergence per token, top-1 agreement and flips."""
    from outlierq.pipeline import measure as measuring

    limits = shared.gate_limits(max_kl, max_perplexity_increase, min_top1, min_task)
    if limits.needs_reference and reference is None:
        raise typer.BadParameter("quality gates compare with an original; give --reference", param_hint="--reference")
    if runtime not in RUNTIMES:
        raise typer.BadParameter(f"{runtime!r}; choose {' or '.join(RUNTIMES)}", param_hint="--runtime")
    if runtime == "packed" and backend == "vllm":
        raise typer.BadParameter("vLLM has its own kernels; leave one of the two out", param_hint="--runtime")
    dtype = dtype or ("bfloat16" if runtime == "packed" else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r}; choose float32, bfloat16 or float16", param_hint="--dtype")
    if backend not in BACKENDS:
        raise typer.BadParameter(f"{backend!r}; choose {' or '.join(BACKENDS)}", param_hint="--backend")
    if backend == "vllm":
        from outlierq.evaluate.tasks import need_vllm

        need_vllm()
    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    wanted = measuring.Measurement(
        text=text,
        windows=windows or None,
        window_length=window_length,
        tasks=tuple(dict.fromkeys([*named, *limits.tasks])),
        data_dir=data_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        dtype=dtype,
        device=shared.choose_device(device),
        backend=backend,
        runtime=runtime,
    )
    shared.refuse_unwritable(out, junit)
    checkpoint = shared.open_model(model, revision, trust_remote_code)
    original = shared.open_model(reference, None, trust_remote_code) if reference else None
    if max_memory is not None:
        check_memory(checkpoint, original, wanted, max_memory)
    if record:
        measuring.read_report(checkpoint.path)  # before hours of work, not after
    with shared.progress(quiet) as listen:
        found = measuring.measure(checkpoint, original, wanted, cached=not no_cache, listen=listen)
    found = measuring.judge(found, limits) | {"command": shared.command_line()}
    if record:
        measuring.record(checkpoint.path, found)
    if out is not None:
        shared.write_file(out, (json.dumps(found, indent=1) + "\n").encode())
    for line in found["divergence"].get("linears", ()):
        shared.say(line, quiet)
    if as_json:
        shared.print_json(found)
    else:
        typer.echo(f"{model} on {found['text']}")
        shared.show_results(found, quiet)
    shared.finish_gate(found, junit)


def check_memory(checkpoint: object, original: object | None, wanted: object, max_memory: str) -> None:
    """Refuse before work what would need more than --max-memory."""
    from outlierq.load import build_skeleton
    from outlierq.pipeline.planning.memory import check_evaluation

    if wanted.tasks:
        raise typer.BadParameter(
            "what tasks need is not known beforehand; leave --tasks out", param_hint="--max-memory"
        )
    models = [build_skeleton(each) for each in (checkpoint, original) if each]
    check_evaluation(models, wanted.dtype, wanted.window_length, shared.ceiling(max_memory))
