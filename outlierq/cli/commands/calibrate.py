"""Run a model once and keep the statistics of every linear input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq.recipe.sections import Calibration

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq calibrate ./SmolLM2-135M -o ./stats\n\n"
    "  outlierq calibrate ./Llama-3.1-8B -o stats --text chats.jsonl --chat-template --samples 256 "
    "--sequence-length 1024"
)


def command(
    context: typer.Context,
    model: shared.Model,
    out: Annotated[str, typer.Option("--out", "-o", help="The folder for the statistics.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of text or rows (.jsonl, .csv, .parquet) or `embedded` (the default). Repeated for a mix."
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
    from outlierq.calibrate.stored.stats_file import StatsReader
    from outlierq.pipeline.calibrate import calibrate
    from outlierq.pipeline.resources import Resources

    given = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "text": text or None}
    chosen = calibration_settings(recipe, settings, given, chat_template, trust_methods)
    folder = shared.out_path(out)
    ranks = shared.ranks_of(context, stream_from_hub)
    if stream_from_hub:
        checkpoint = shared.open_streamed(context, model, folder, revision, trust_remote_code)
    else:
        checkpoint = shared.open_model(model, revision, trust_remote_code)
    with shared.progress(quiet) as listen:
        identity = calibrate(
            checkpoint,
            chosen,
            folder,
            resources=Resources(shared.choose_device(device), listen, ranks, shared.ceiling(max_memory)),
        )
    if not ranks.lead:
        return
    checkpoint.drop_shards()
    size = sum(path.stat().st_size for path in folder.iterdir())
    notes = StatsReader(folder).notes
    if as_json:
        shared.print_json({"stats": str(folder), "bytes": size, "notes": notes, **identity.to_json()})
    else:
        from outlierq.report.terminal import human_bytes

        typer.echo(f"{identity.token_description}\nstatistics written: {out} ({human_bytes(size)})")
        for text in notes:
            typer.echo(f"note: {text}")
        typer.echo(f"use them with: outlierq quantize {model} --recipe NAME --stats {out} -o OUT")


def calibration_settings(
    recipe: str | None, settings: list[str] | None, given: dict, chat_template: bool, trust_methods: bool = False
) -> Calibration | None:
    """The calibration section of the recipe (or the defaults) with the command line's values on top."""
    import json

    from outlierq.recipe import load, parse

    base = load(recipe, settings, trust_methods=trust_methods).calibration if recipe else None
    section = base.model_dump(mode="json") if base else {}
    section |= {key: value for key, value in given.items() if value is not None}
    section |= {"chat_template": True} if chat_template else {}
    content = json.dumps({"calibration": section, "export": {"format": "dense"}})
    return parse(content, name="calibrate options", settings=None if recipe else settings).calibration
