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
    recipe: shared.RecipeName = "gptq-w4",
    settings: shared.Settings = None,
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
) -> None:
    """Show what each tensor becomes and why, the exact output size, memory and time; reads headers only."""
    from outlierq.pipeline.plan import estimate, make_plan
    from outlierq.report.terminal import human_bytes, human_seconds

    chosen = shared.load_recipe(recipe, settings)
    plan = make_plan(shared.open_model(model, revision, trust_remote_code), chosen, trust_remote_code=trust_remote_code)
    expected = estimate(plan)
    if as_json:
        shared.print_json(describe(plan, expected))
        return
    shared.show(shared.plan_view(plan))
    typer.echo(
        f"output: {human_bytes(plan.output_bytes)} ({plan.output_bytes:,} bytes, exact) in "
        f"{len(plan.layout.sizes)} weight file(s), {plan.bits_per_weight:.2f} bits per weight\n"
        f"estimated, within a factor of two: {human_seconds(expected.seconds)}, "
        f"peak memory {human_bytes(expected.peak_bytes)}"
    )


def describe(plan: object, expected: object) -> dict:
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
        "notes": plan.notes,
        "clients": plan.clients,
    }
