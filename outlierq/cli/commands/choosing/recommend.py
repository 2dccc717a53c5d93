"""Say which recipes suit a model, a card and a client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq recommend ./Llama-3.1-8B --gpu L4\n\n"
    "  outlierq recommend meta-llama/Llama-3.1-8B --gpu H100 --for vllm --goal speed\n\n"
    "  outlierq recommend ./Llama-3.1-8B --gpu cpu --for llama.cpp --stats ./stats"
)


def command(
    model: shared.Model,
    gpu: Annotated[
        str | None, typer.Option(help="What will run the result: L4, H100, B200, MI350 and others, or cpu.")
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="CLIENT", help="What will load it: vllm (llama.cpp for cpu), llama.cpp or transformers."
        ),
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="size, speed or quality; one recipe for each without it.", metavar="GOAL")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="What `outlierq calibrate` wrote: losses are predicted from it.")
    ] = None,
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Name three recipes for MODEL, with the reason, the exact size, the expected loss and the command to copy.

    Headers are read only. Each recipe was asked of the planner, and is known to load in the client; those that fit the
    card come first.
    """
    import outlierq

    with shared.progress(quiet) as listen:
        advice = outlierq.recommend(
            model,
            gpu=gpu,
            client=client,
            goal=goal,
            stats=stats,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    if as_json:
        shared.print_json(advice.to_dict())
        return
    from outlierq.report import advice_text

    shared.show(*advice_text.advice(advice))
