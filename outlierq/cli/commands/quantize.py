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
    "  outlierq quantize model.gguf -r my-recipe.yaml --stats ./stats -o out"
)


def command(
    model: shared.Model,
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    recipe: shared.RecipeName = "gptq-w4",
    settings: shared.Settings = None,
    stats: Annotated[
        Path | None, typer.Option(help="Reuse the statistics that `outlierq calibrate` wrote; no forward pass runs.")
    ] = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished run in the same place.")] = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Compress MODEL with a recipe and write a verified checkpoint to OUT.

    The plan is printed first. An interrupted run continues where it stopped when the same command is given again.
    """
    from outlierq.pipeline.plan import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.report import terminal

    chosen = shared.load_recipe(recipe, settings)
    checkpoint = shared.open_model(model, revision, trust_remote_code)
    plan = make_plan(checkpoint, chosen, trust_remote_code=trust_remote_code)
    if not quiet:
        shared.show(shared.plan_view(plan), stderr=True)
    with shared.progress(quiet) as listen:
        report = quantize(
            plan,
            shared.out_path(out),
            stats=stats,
            device=shared.choose_device(device),
            restart=restart,
            listen=listen,
        )
    if as_json:
        shared.print_json(report.to_dict())
    else:
        shared.show(terminal.summary(report))
        typer.echo(f"written and verified: {out}")
