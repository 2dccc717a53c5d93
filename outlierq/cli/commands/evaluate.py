"""Measure a checkpoint: perplexity, divergence from its original, named tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq import Evaluation

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
    text: shared.Text = None,
    windows: shared.Windows = 24,
    window_length: shared.WindowLength = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in tasks.")] = 1,
    backend: Annotated[
        str,
        typer.Option(
            help="Who answers the tasks: transformers (outlierq loads the model) or vllm; llama.cpp runs a GGUF "
            "file, and counts as llama-perplexity does."
        ),
    ] = "transformers",
    runtime: Annotated[
        str, typer.Option(help="How MODEL computes: dense (weights decoded first) or packed (multiplied as stored).")
    ] = "dense",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; default: float32, with --runtime packed bfloat16."),
    ] = None,
    no_bos: Annotated[
        bool,
        typer.Option("--no-bos", help="Windows of text alone, without what the tokenizer puts before a text (BOS)."),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens of context in tasks; 0: all positions, as in lm-eval.", show_default="2048"),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Keys and values of MODEL as a server keeps them: fp8, int8, int4 (per token and head) or nvfp4; or "
            "as papers do: kivi-2, rotatekv-2, kvquant-3 ... (see study cache). Default: as the checkpoint says."
        ),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also let both models continue three prompts; a model card shows them.")
    ] = False,
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
    import outlierq

    with shared.progress(quiet) as listen:
        evaluation = outlierq.evaluate(
            model,
            reference,
            tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
            data_dir=data_dir,
            text=text,
            windows=windows or None,
            window_length=window_length,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            backend=backend,
            runtime=runtime,
            dtype=dtype,
            bos=not no_bos,
            max_length=max_length,
            kv_cache=kv_cache,
            generate=generate,
            limits=outlierq.Limits.of(max_kl, max_perplexity_increase, min_top1, min_task),
            out=out,
            junit=junit,
            record=record,
            cached=not no_cache,
            device=device,
            max_memory=max_memory,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
            command=shared.command_line(),
        )
    from outlierq.report.ci import github

    shared.on_page(lambda: github.of_evaluation(evaluation))
    for line in evaluation["divergence"].get("linears", ()):
        shared.say(line, quiet)
    if as_json:
        shared.print_json(evaluation)
    else:
        typer.echo(f"{model} on {evaluation['text']}")
        show_results(evaluation, quiet)
    evaluation.raise_if_failed()


def show_results(evaluation: Evaluation, quiet: bool) -> None:
    """What was measured, and the gate when there is one."""
    from outlierq.report import terminal

    shared.show(*terminal.evaluation(evaluation))
    for note in evaluation.get("notes", ()):
        shared.say(f"note: {note}")
    if evaluation["from_cache"]:
        names = ", ".join(evaluation["from_cache"])
        shared.say(f"measured before and taken from the cache: {names} (--no-cache measures again)", quiet)
