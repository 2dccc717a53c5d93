"""Say what a recipe would do to a model, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq.pipeline.planning.estimate import Estimate
    from outlierq.pipeline.planning.plan import Plan

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
    from outlierq.pipeline.planning.decide import make_plan
    from outlierq.pipeline.planning.estimate import estimate
    from outlierq.report.terminal import human_bytes, human_seconds

    plan = conversion(model, format, recipe, settings, revision, trust_remote_code)
    if plan is None:
        settings = shared.with_format(settings, format)
        chosen = shared.load_recipe(recipe or shared.DEFAULT_RECIPE, settings, trust_methods)
        checkpoint = shared.open_headers(model, revision, trust_remote_code)
        plan = make_plan(checkpoint, chosen)
    expected, savings = estimate(plan), None
    if max_memory is not None:
        from outlierq.pipeline.expert_stats import works_of
        from outlierq.pipeline.planning.memory import check_together, choose

        works, ceiling = works_of(plan), shared.ceiling(max_memory)
        check_together(works, ceiling)
        savings = list(dict.fromkeys(said for work in works for said in choose(work, ceiling).sentences))
    if as_json:
        shared.print_json(describe(plan, expected) | ({} if savings is None else {"max_memory": savings}))
        return
    shared.show(shared.plan_view(plan))
    typer.echo(
        f"output: {human_bytes(plan.output_bytes)} ({plan.output_bytes:,} bytes, exact) in "
        f"{len(plan.layout.sizes)} weight file(s), {plan.bits_per_weight:.2f} bits per weight\n"
        f"estimated, within a factor of two: {human_seconds(expected.seconds)}; "
        f"peak memory at most {human_bytes(expected.peak_bytes)}"
    )
    if savings is not None:
        how = "\n".join(f"  {sentence}" for sentence in savings) or "  nothing has to be done for that"
        typer.echo(f"with --max-memory {max_memory}, memory stays below that:\n{how}")


def conversion(
    model: str,
    format: str | None,
    recipe: str | None,
    settings: list[str] | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Plan | None:
    """The plan of a conversion, None when none is asked for."""
    if format is None:
        return None
    checkpoint = shared.open_model(model, revision, trust_remote_code)
    if not shared.conversion_wanted(checkpoint, shared.known_format(format), recipe, settings):
        return None
    from outlierq.pipeline.convert import make_conversion

    return make_conversion(checkpoint, format)


def describe(plan: Plan, expected: Estimate) -> dict:
    """The plan for machines."""
    return {
        "model": plan.checkpoint.source,
        "recipe": plan.recipe.name,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "weight_files": plan.layout.sizes,
        "bits_per_weight": plan.bits_per_weight,
        "quantized_bits_per_weight": plan.quantized_bits_per_weight,
        "estimated_peak_bytes": expected.peak_bytes,
        "estimated_seconds": expected.seconds,
        "sites": [
            {"module": p.site.module, "scheme": str(p.scheme) if p.scheme else None, "reason": p.reason}
            for p in plan.sites
        ],
        "exact": not plan.approximations,
        "notes": plan.notes,
        "clients": plan.clients,
    }
