"""Which tensors two checkpoints do not share, and by how much the others differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq import Difference

EXAMPLES = "Examples:\n\n  outlierq diff ./SmolLM2-135M ./SmolLM2-135M-W4\n\n  outlierq diff a.gguf ./b --json"
SHOWN = 20  # changed tensors printed; JSON has all


def command(
    a: Annotated[str, typer.Argument(help="A checkpoint: folder, Hub id or GGUF file.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Tensors added, removed and changed from A to B, by decoded values, with the error of each."""
    import outlierq

    with shared.progress(quiet) as listen:
        difference = outlierq.diff(a, b, trust_remote_code=trust_remote_code, progress=listen)
    if as_json:
        shared.print_json({"a": a, "b": b, **difference.to_dict()})
        return
    for line in lines(difference):
        typer.echo(line)


def lines(difference: Difference) -> list[str]:
    """The differences, one a line."""
    shown = [f"- {name}" for name in difference.removed] + [f"+ {name}" for name in difference.added]
    for change in difference.changed[:SHOWN]:
        how = f"{' -> '.join(str(list(shape)) for shape in change.shapes)}"
        if change.relative_error is not None:
            how = f"relative error {change.relative_error:.3%}, largest {change.largest:.3g}"
        shown.append(f"~ {change.name}: {how}")
    if len(difference.changed) > SHOWN:
        shown.append(f"~ and {len(difference.changed) - SHOWN} more (--json lists all)")
    if difference.config:
        shown.append(f"config.json differs in {', '.join(difference.config)}")
    if difference.moved:
        what = "folds or rotations of its run made of the other's, which change nothing of what the model computes"
        shown.append(f"{len(difference.moved)} tensors are what {what}")
    counts = f"{len(difference.added)} added, {len(difference.removed)} removed, {len(difference.changed)} changed"
    return [*shown, f"{counts}, {difference.equal} equal"]
