"""Say whether a checkpoint is whole and consistent, and what became of its source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared
from outlierq.core.errors import EXIT_ERROR

if TYPE_CHECKING:
    from outlierq import Verification

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq verify ./SmolLM2-135M-W4\n\n"
    "  outlierq verify ./made-by-another-program --source ./SmolLM2-135M --json"
)
SHOWN = 20  # faults printed; JSON has all


def command(
    target: Annotated[str, typer.Argument(help="A checkpoint: folder, Hub id or GGUF file, of any program.")],
    source: Annotated[
        str | None, typer.Option("--source", help="The checkpoint it was made from, for the error of each weight.")
    ] = None,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Decode every tensor of TARGET and report what is wrong; exit code 1 when something is.

    Checked: files and shapes, every tensor accounted for, finite numbers, config.json against the tensors, tied
    weights, zero points, and with --source the error of every quantized weight.
    """
    import outlierq

    with shared.progress(quiet) as listen:
        verification = outlierq.verify(target, source, trust_remote_code=trust_remote_code, progress=listen)
    if as_json:
        shared.print_json(verification.to_dict())
    else:
        for line in lines(verification):
            typer.echo(line)
    if not verification.sound:
        raise typer.Exit(EXIT_ERROR)


def lines(verification: Verification) -> list[str]:
    """The findings, one a line."""
    what = f"{verification.quantization} " if verification.quantization else ""
    counts = f"{verification.tensors} tensors, {verification.linears} quantized weights"
    shown = [f"{verification.source}: {what}checkpoint of {counts}"]
    if verification.errors:
        ordered = sorted(verification.errors, key=lambda name: verification.errors[name])
        middle, worst = ordered[len(ordered) // 2], ordered[-1]
        shown.append(
            f"relative error against {verification.original}: median {verification.errors[middle]:.2%}, largest "
            f"{verification.errors[worst]:.2%} ({worst})"
        )
    shown += [f"note: {note}" for note in verification.notes]
    shown += [f"fault: {f.tensor + ': ' if f.tensor else ''}{f.what} [{f.check}]" for f in verification.faults[:SHOWN]]
    if len(verification.faults) > SHOWN:
        shown.append(f"and {len(verification.faults) - SHOWN} more faults (--json lists all)")
    return [*shown, "sound: no fault found" if verification.sound else f"{len(verification.faults)} fault(s) found"]
