"""Try many recipes on MODEL from one calibration, and measure them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq import SweepRow

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq sweep ./SmolLM2-135M -r rtn-w4,gptq-w4,awq-gptq-w4 -o runs\n\n"
    "  outlierq sweep ./SmolLM2-135M -r gptq-w4 --bits 3,4,5 --text judge.txt -o runs --csv > runs.csv"
)


def command(
    model: shared.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for all results, and the table.")],
    recipe: Annotated[
        list[str],
        typer.Option(
            "--recipe", "-r", help="Recipes, separated by commas, or repeated.", autocompletion=shared.recipe_names
        ),
    ],
    bits: Annotated[str | None, typer.Option(help="Each recipe at these numbers of bits: 3,4,5.")] = None,
    settings: shared.Settings = None,
    text: shared.Text = None,
    windows: shared.Windows = 24,
    window_length: shared.WindowLength = 512,
    tasks: Annotated[list[str] | None, typer.Option(help="Tasks of lm-eval to measure, too. May be repeated.")] = None,
    data_dir: shared.DataDir = None,
    device: shared.Device = "auto",
    max_memory: shared.MaxMemory = None,
    trust_remote_code: shared.RemoteCode = False,
    trust_methods: shared.TrustMethods = False,
    as_json: shared.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV to stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table to stdout.")] = False,
    quiet: shared.Quiet = False,
) -> None:
    """Run all recipes from one calibration and measure each beside MODEL: size, KL, perplexity, top-1, tasks, time.

    The same command goes on where it stopped; with more recipes it runs those that are new.
    """
    import outlierq

    def told(row: SweepRow) -> None:
        shared.say(f"{row.name}: {row.fault or f'KL {row.kl:.4f}, {row.nbytes:,} bytes'}", quiet)

    with shared.progress(quiet) as listen:
        swept = outlierq.sweep(
            model,
            [name for names in recipe for name in names.split(",") if name],
            out=out,
            bits=shared.numbers_of(bits, "bits"),
            settings=settings,
            text=text,
            windows=windows or None,
            window_length=window_length,
            tasks=tasks or (),
            data_dir=data_dir,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            trust_methods=trust_methods,
            progress=listen,
            told=told,
        )
    shared.on_page(swept.markdown)
    if as_json:
        shared.print_json(swept.to_dict())
    elif as_csv or as_markdown:
        typer.echo(swept.csv() if as_csv else swept.markdown(), nl=False)
    else:
        from outlierq.report import terminal

        shared.show(terminal.sweep(swept))
