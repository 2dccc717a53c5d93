"""Compress MODEL as a recipe says and write a new checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq.core.model import Checkpoint

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq quantize ./SmolLM2-135M --recipe awq-gptq-w4 -o ./SmolLM2-135M-W4\n\n"
    "  outlierq quantize meta-llama/Llama-3.1-8B -r gptq-w4 --set quantize.group_size=64 -o out\n\n"
    "  outlierq quantize model.gguf -r my-recipe.yaml --stats ./stats -o out\n\n"
    "  outlierq quantize ./SmolLM2-135M -o out --max-kl 0.05 --max-perplexity-increase 3% --junit gate.xml"
)


def command(
    context: typer.Context,
    model: shared.Model,
    out: Annotated[str, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")],
    recipe: shared.OptionalRecipe = None,
    settings: shared.Settings = None,
    format: shared.Format = None,
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
    restart: Annotated[bool, typer.Option("--restart", help="Throw away an unfinished run in the same place.")] = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Compress MODEL with a recipe and write a verified checkpoint to OUT.

    The plan is printed first. An interrupted run continues where it stopped when the same command is given again.
    With a gate (in the recipe or as options) the result is measured beside MODEL; exit code 3 when a limit is passed.
    """
    from outlierq.load import reading_ahead
    from outlierq.pipeline.expert_stats import expert_stats, remove_expert_stats
    from outlierq.pipeline.measure import Measurement, check_measurement, judge, measure, record, unmeasured
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.quantize import quantize
    from outlierq.pipeline.resources import Resources
    from outlierq.report import terminal

    asked = shared.gate_settings(max_kl, max_perplexity_increase, min_top1, min_task)
    checkpoint = None
    ranks = shared.ranks_of(context, stream_from_hub)
    ceiling = shared.ceiling(max_memory)

    def opened() -> Checkpoint:
        if stream_from_hub:
            return shared.open_streamed(context, model, shared.out_path(out), revision, trust_remote_code, restart)
        return shared.open_model(model, revision, trust_remote_code)

    if format is not None:
        checkpoint = opened()
        if shared.conversion_wanted(checkpoint, shared.known_format(format), recipe, [*(settings or []), *asked]):
            shared.refuse_several(ranks, "converting without loss")
            if ceiling is not None:
                raise typer.BadParameter("a conversion has no ceiling", param_hint="--max-memory")
            convert(checkpoint, format, out, restart, as_json, quiet)
            checkpoint.drop_shards()
            return
    settings = shared.with_format(settings, format)
    chosen = shared.load_recipe(recipe or shared.DEFAULT_RECIPE, [*settings, *asked], trust_methods)
    if junit is not None and chosen.gate is None:
        raise typer.BadParameter("there is no gate; give a limit such as --max-kl", param_hint="--junit")
    shared.refuse_unwritable(junit)
    checkpoint = checkpoint or opened()
    where = shared.choose_device(device)
    measurement = None
    if chosen.gate is not None:
        measurement = Measurement.of_gate(chosen.gate, device=where, data_dir=data_dir)
        ranks.first(lambda: check_measurement(checkpoint, measurement))
    with shared.progress(quiet) as listen:
        resources = Resources(where, listen, ranks, ceiling)
        chosen_by = expert_stats(
            checkpoint, chosen, shared.out_path(out), given=stats, restart=restart, resources=resources
        )
    with reading_ahead(checkpoint):  # a plan needs seconds of imports, and no weights
        plan = make_plan(checkpoint, chosen, expert_stats=chosen_by)
    if ceiling is not None and chosen.gate is not None:
        from outlierq.pipeline.planning.memory import check_evaluation

        check_evaluation([plan.model.skeleton] * 2, chosen.gate.dtype, chosen.gate.window_length, ceiling)
    if not quiet:
        shared.show(shared.plan_view(plan), stderr=True)
    with shared.progress(quiet) as listen:
        # A run that was stopped while its gate was measured goes on there.
        report = None
        if chosen.gate is not None and not restart:
            report = ranks.first(lambda: unmeasured(shared.out_path(out), plan))
        report = report or quantize(
            plan,
            shared.out_path(out),
            stats=None if chosen_by else stats,  # of the whole model, which is not the one that is quantized
            restart=restart,
            resources=Resources(where, listen, ranks, ceiling),
        )
        if not ranks.lead:
            return
        results = None
        if measurement is not None:
            results = judge(
                measure(shared.open_model(out, None, trust_remote_code), checkpoint, measurement, listen=listen),
                chosen.gate.limits,
            )
            report = record(shared.out_path(out), results | {"command": shared.command_line()})
    remove_expert_stats(shared.out_path(out))
    checkpoint.drop_shards()
    if as_json:
        shared.print_json(report.to_dict())
    else:
        shared.show(terminal.summary(report))
        typer.echo(f"written and verified: {out}")
        if results and results["gate"]:
            shared.show(terminal.gate(shared.gate_rows(results)))
    if results:
        shared.finish_gate(results, junit)


def convert(checkpoint: object, format: str, out: str, restart: bool, as_json: bool, quiet: bool) -> None:
    """Write the codes and scales of a compressed checkpoint in another format."""
    from outlierq.pipeline.convert import convert, make_conversion
    from outlierq.report import terminal

    with shared.progress(quiet) as listen:
        plan = make_conversion(checkpoint, format, listen=listen)
    if not quiet:
        shared.show(shared.plan_view(plan), stderr=True)
    with shared.progress(quiet) as listen:
        report = convert(plan, shared.out_path(out), restart=restart, listen=listen)
    if as_json:
        shared.print_json(report.to_dict())
    else:
        shared.show(terminal.summary(report))
        typer.echo(f"converted without loss and verified: {out}")
