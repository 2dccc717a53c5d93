"""Compress MODEL as a recipe says and write a new checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq quantize ./SmolLM2-135M --recipe awq-gptq-w4 -o ./SmolLM2-135M-W4\n\n"
    "  outlierq quantize meta-llama/Llama-3.1-8B -r gptq-w4 --set quantize.group_size=64 -o out\n\n"
    "  outlierq quantize model.gguf -r my-recipe.yaml --stats ./stats -o out\n\n"
    "  outlierq quantize ./model -r gguf-q4_k --like model-f16.gguf -o model-Q4_K.gguf\n\n"
    "  outlierq quantize ./SmolLM2-135M -o out --max-kl 0.05 --max-perplexity-increase 3% --junit gate.xml"
)


def command(
    model: shared.Model,
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    recipe: shared.OptionalRecipe = None,
    settings: shared.Settings = None,
    format: shared.Format = None,
    like: shared.Like = None,
    stats: Annotated[
        Path | None, typer.Option(help="Reuse the statistics that `outlierq calibrate` wrote; no forward pass runs.")
    ] = None,
    max_kl: shared.MaxKl = None,
    max_perplexity_increase: shared.MaxPerplexityIncrease = None,
    min_top1: shared.MinTop1 = None,
    min_task: shared.MinTask = None,
    data_dir: shared.DataDir = None,
    junit: shared.Junit = None,
    device: shared.Device = "auto",
    max_memory: shared.MaxMemory = None,
    revision: shared.Revision = None,
    stream_from_hub: shared.StreamFromHub = False,
    trust_remote_code: shared.RemoteCode = False,
    trust_methods: shared.TrustMethods = False,
    restart: shared.Restart = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Compress MODEL with a recipe and write a verified checkpoint to OUT.

    The plan is printed first. An interrupted run continues where it stopped when the same command is given again.
    With a gate (in the recipe or as options) the result is measured beside MODEL; exit code 3 when a limit fails.
    """
    import outlierq

    with shared.progress(quiet) as listen:
        report = outlierq.quantize(
            model,
            recipe,
            out=out,
            settings=settings,
            format=format,
            like=like,
            stats=stats,
            limits=outlierq.Limits.of(max_kl, max_perplexity_increase, min_top1, min_task),
            data_dir=data_dir,
            junit=junit,
            device=device,
            max_memory=max_memory,
            revision=revision,
            stream_from_hub=stream_from_hub,
            trust_remote_code=trust_remote_code,
            trust_methods=trust_methods,
            restart=restart,
            progress=listen,
            planned=None if quiet else shared.plan_shower(),
            command=shared.command_line(),
        )
    from outlierq.report import terminal
    from outlierq.report.ci import github

    shared.on_page(lambda: github.of_run(report))
    if as_json:
        shared.print_json(report.to_dict())
    else:
        shared.show(terminal.summary(report))
        typer.echo(f"{'converted without loss' if report.is_conversion else 'written'} and verified: {out}")
        if report.evaluation and report.evaluation.gate_rows:
            shared.show(terminal.gate(report.evaluation.gate_rows))
    if report.evaluation:
        report.evaluation.raise_if_failed()
