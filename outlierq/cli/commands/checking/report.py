"""A whole run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq report ./SmolLM2-135M-W4\n\n"
    "  outlierq report ./out -o run.html --reference ./SmolLM2-135M --samples 4"
)


def command(
    run: Annotated[
        Path, typer.Argument(metavar="OUT", help="What `outlierq quantize` wrote: a folder or a GGUF file.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write.", show_default="OUT.report.html")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The original: then both models answer prompts, side by side.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=8, help="Prompts that they answer.", rich_help_panel="Options")
    ] = 3,
    device: shared.Device = "auto",
    revision: shared.Revision = None,
    trust_remote_code: shared.RemoteCode = False,
    quiet: shared.Quiet = False,
) -> None:
    """Show a whole run on one page: size, loss, gate, errors by block, samples, where all of it comes from."""
    import outlierq

    with shared.progress(quiet) as listen:
        page = outlierq.report_page(
            run,
            out=out,
            reference=reference,
            samples=samples,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    typer.echo(f"written: {page}")
