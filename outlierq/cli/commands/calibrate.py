"""Run a model once and keep the statistics of every linear input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    pass

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq calibrate ./SmolLM2-135M -o ./stats\n\n"
    "  outlierq calibrate ./Llama-3.1-8B -o stats --text chats.jsonl --chat-template --samples 256 "
    "--sequence-length 1024"
)


def command(
    model: shared.Model,
    out: Annotated[str, typer.Option("--out", "-o", help="The folder for the statistics.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of text or rows (.jsonl, .csv, .parquet) or `mix` (the default). Repeated to mix several."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Take the calibration section of this recipe.",
            autocompletion=shared.recipe_names,
        ),
    ] = None,
    settings: shared.Settings = None,
    samples: Annotated[int | None, typer.Option(help="Number of token windows [128].")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a window [512].")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Render documents with the model's chat template.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Chooses among the windows [0].")] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also measure what an error of each linear costs at the end of the model (one backward pass), so that "
            "`outlierq fit` predicts the KL divergence. Finished statistics get it, too.",
        ),
    ] = False,
    serve: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep only what these recipes read, separated by commas: less room on disk.",
            autocompletion=shared.recipe_names,
        ),
    ] = None,
    imatrix: Annotated[
        str | None,
        typer.Option(help="Write them to this file, too, as llama.cpp's importance matrix (GGUF)."),
    ] = None,
    device: shared.Device = "auto",
    max_memory: shared.MaxMemory = None,
    revision: shared.Revision = None,
    stream_from_hub: shared.StreamFromHub = False,
    trust_remote_code: shared.RemoteCode = False,
    trust_methods: shared.TrustMethods = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Collect the statistics that every method works from; any number of recipes then run without a forward pass."""
    import outlierq
    from outlierq.report.terminal import human_bytes

    with shared.progress(quiet) as listen:
        stats = outlierq.calibrate(
            model,
            out=out,
            recipe=recipe,
            settings=settings,
            text=text,
            samples=samples,
            sequence_length=sequence_length,
            chat_template=chat_template,
            seed=seed,
            sensitivity=sensitivity,
            serve=[name for names in serve or () for name in names.split(",") if name],
            imatrix=imatrix,
            device=device,
            max_memory=max_memory,
            revision=revision,
            stream_from_hub=stream_from_hub,
            trust_remote_code=trust_remote_code,
            trust_methods=trust_methods,
            progress=listen,
            told=lambda nbytes: shared.say(f"statistics will take up to {human_bytes(nbytes)} in {out}", quiet),
        )
    if as_json:
        shared.print_json(stats.to_dict())
        return
    typer.echo(f"{stats.description}\nstatistics written: {out} ({human_bytes(stats.nbytes)})")
    for note in stats.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"use them with: outlierq quantize {model} --recipe NAME --stats {out} -o OUT")
