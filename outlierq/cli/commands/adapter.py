"""A LoRA adapter that gives back to a compressed checkpoint what a low rank can."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n  outlierq calibrate ./SmolLM2-135M -o stats\n\n"
    "  outlierq quantize ./SmolLM2-135M -r gptq-w4 --stats stats -o w4\n\n"
    "  outlierq adapter ./SmolLM2-135M w4 --stats stats --rank 32 -o w4-adapter"
)


def command(
    model: shared.Model,
    compressed: Annotated[str, typer.Argument(help="What a recipe that only rounds made of MODEL.")],
    stats: Annotated[Path, typer.Option(help="Statistics of `outlierq calibrate` on MODEL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the adapter.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the matrices; every one adds rank * (out + in) weights.")] = 32,
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Write what rounding took, as far as RANK holds it, as a LoRA adapter that PEFT and vLLM load on COMPRESSED."""
    import outlierq

    with shared.progress(quiet) as listen:
        adapter = outlierq.adapter(
            model,
            compressed,
            stats=stats,
            out=out,
            rank=rank,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    if as_json:
        shared.print_json(adapter.to_dict())
        return
    typer.echo(
        f"{len(adapter.rows)} linears, rank {adapter.rank}: {adapter.bits_per_weight:.3f} bits per weight more, mean "
        f"relative output error {adapter.before:.3g} -> {adapter.after:.3g}"
    )
    shared.say(f"written: {adapter.out}", quiet)
