"""A compressed checkpoint with better scales, gains and biases, and the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n  outlierq tune ./w4 --reference ./SmolLM2-135M\n\n"
    "  outlierq tune ./w3 --reference ./SmolLM2-135M --text notes.txt --samples 128 -o w3-tuned\n\n"
    "  outlierq tune ./w3 --reference ./SmolLM2-135M --tune norms --steps 20"
)


def command(
    compressed: Annotated[str, typer.Argument(help="What `quantize`, or another program, made of the original.")],
    reference: Annotated[str, typer.Option(help="The original: a Hugging Face folder, a Hub id, or a GGUF file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder.", show_default="COMPRESSED-tuned")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text file to tune on.", show_default="what `quantize` calibrates on")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of the text; an eighth of them is held out and judges.")] = 64,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Steps.", show_default="three times through the text")
    ] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a step.")] = 1024,
    step_size: Annotated[
        float | None,
        typer.Option(min=0, help="The largest relative step.", show_default="0.015 of the mean error of the weights"),
    ] = None,
    tune: Annotated[
        str, typer.Option(help="What may move, separated by commas: scales, norms, biases.")
    ] = "scales,norms,biases",
    seed: Annotated[int, typer.Option(help="Chooses the windows, and their order.")] = 0,
    dtype: Annotated[str, typer.Option(help="In which blocks run: float32 or bfloat16.")] = "float32",
    restart: shared.Restart = False,
    device: shared.Device = "auto",
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Tune scales, norms and biases of COMPRESSED against the original's predictions; codes stay as they are."""
    import outlierq

    beside = compressed.rstrip("/") if Path(compressed).exists() else Path(compressed).name  # that of a Hub id
    place = out or Path(f"{beside}-tuned")
    with shared.progress(quiet) as listen:
        tuned = outlierq.tune(
            compressed,
            reference,
            out=place,
            text=text,
            samples=samples,
            sequence_length=sequence_length,
            steps=steps,
            step_tokens=step_tokens,
            step_size=step_size,
            kinds=[kind.strip() for kind in tune.split(",") if kind.strip()],
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            restart=restart,
            progress=listen,
        )
    if as_json:
        shared.print_json(tuned.to_dict())
        return
    for note in tuned.notes:
        shared.say(f"note: {note}")
    typer.echo(tuned.summary)
    shared.say(f"written: {tuned.out}; `outlierq eval` with --reference measures it on other text", quiet)
