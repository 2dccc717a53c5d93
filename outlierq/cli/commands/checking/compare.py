"""Two checkpoints side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq compare ./SmolLM2-135M ./SmolLM2-135M-W4\n\n"
    "  outlierq compare ./original ./out --quality --windows 32 --json"
)


def command(
    a: Annotated[str, typer.Argument(help="A checkpoint: folder, Hub id or GGUF file.")],
    b: Annotated[str, typer.Argument(help="Another one, for example A compressed.")],
    quality: Annotated[
        bool, typer.Option("--quality", help="Also measure B against A: KL, top-1 agreement, perplexity.")
    ] = False,
    text: shared.Text = None,
    windows: Annotated[int, typer.Option(min=0, help="Number of windows of 512 tokens; 0 takes all.")] = 24,
    device: shared.Device = "auto",
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Sizes, bits per weight and changed tensors of two checkpoints, from headers; with --quality their divergence."""
    import outlierq

    with shared.progress(quiet) as listen:
        compared = outlierq.compare(
            a,
            b,
            quality=quality,
            text=text,
            windows=windows or None,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=listen,
        )
    if as_json:
        shared.print_json({"models": {"a": a, "b": b}, **compared.to_dict()})
        return
    from outlierq.report import terminal

    shared.show(terminal.comparison(compared, names=("A", "B")))
    if compared.divergence:
        shared.show(terminal.divergence(compared.divergence))
