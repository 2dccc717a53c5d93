"""For every size of MODEL the least predicted loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq frontier ./SmolLM2-135M --stats ./stats -o frontier.html\n\n"
    "  outlierq frontier ./Llama-3.1-8B --stats ./stats --client vllm --json | jq '.points[-1]'"
)


def command(
    model: shared.Model,
    stats: shared.Stats,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A page on which a budget is dragged (.html), or JSON (.json).")
    ] = None,
    client: shared.Client = "transformers",
    numbers: shared.Numbers = None,
    recipe: shared.OptionalRecipe = None,
    settings: shared.Settings = None,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    trust_methods: shared.TrustMethods = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Show what every size costs at the least, from statistics and weights; no text runs through MODEL."""
    import outlierq

    with shared.progress(quiet) as listen:
        frontier = outlierq.frontier(
            model,
            recipe,
            stats=stats,
            out=out,
            client=client,
            numbers=numbers or (),
            settings=settings,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            trust_methods=trust_methods,
            progress=listen,
        )
    if as_json:
        shared.print_json(frontier.to_dict())
    else:
        from outlierq.report import terminal

        shared.show(terminal.frontier(frontier))
    if out is not None:
        shared.say(f"written: {out}", quiet)
