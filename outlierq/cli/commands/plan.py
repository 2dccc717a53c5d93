"""Say what a recipe would do to a model, from headers alone."""

from __future__ import annotations

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq plan ./Llama-3.1-8B --recipe gptq-w4\n\n"
    "  outlierq plan model.gguf -r awq-w4 --set quantize.group_size=64 --json"
)


def command(
    model: shared.Model,
    recipe: shared.OptionalRecipe = None,
    settings: shared.Settings = None,
    format: shared.Format = None,
    like: shared.Like = None,
    max_memory: shared.MaxMemory = None,
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    trust_methods: shared.TrustMethods = False,
    as_json: shared.AsJson = False,
) -> None:
    """Show what each tensor becomes and why, the exact output size, memory and time; reads headers only.

    With --format alone and a compressed MODEL: whether it can be converted without loss; that reads every weight.
    With --max-memory: whether the run stays below it, and what is done for that.
    """
    import outlierq

    plan = outlierq.plan(
        model,
        recipe,
        settings=settings,
        format=format,
        like=like,
        max_memory=max_memory,
        revision=revision,
        trust_remote_code=trust_remote_code,
        trust_methods=trust_methods,
    )
    if as_json:
        shared.print_json(plan.to_dict())
        return
    from outlierq.report import terminal

    shared.show(terminal.plan_of(plan))
    for line in terminal.expectations(plan, max_memory):
        typer.echo(line)
