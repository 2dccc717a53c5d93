"""Upload a checkpoint that outlierq wrote, with its card, when it is sound and its gate passed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from outlierq.cli import shared

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq publish ./SmolLM2-135M-W4 me/SmolLM2-135M-W4 --dry-run\n\n"
    "  outlierq publish ./out me/SmolLM2-135M-W4 --max-kl 0.05 --base-model HuggingFaceTB/SmolLM2-135M --public"
)


def command(
    folder: Annotated[Path, typer.Argument(help="The folder that `quantize -o` wrote.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="Where it goes on the Hub: owner/name.", metavar="REPO")],
    base_model: Annotated[
        str | None, typer.Option(help="The original's Hub id, where the source was a local one; `none` if it has none.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="The licence; default: what the source's card says.")
    ] = None,
    outliers: Annotated[
        Path | None, typer.Option(help="A report of `outlierq detect -o`, for pictures; default: DIR/outliers.json.")
    ] = None,
    max_kl: shared.MaxKl = None,
    max_perplexity_increase: shared.MaxPerplexityIncrease = None,
    min_top1: shared.MinTop1 = None,
    min_task: shared.MinTask = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; it is private else.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Replace the files of an existing repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the card; nothing is sent, no network is used.")
    ] = False,
    trust_remote_code: shared.RemoteCode = False,
    as_json: shared.AsJson = False,
    quiet: shared.Quiet = False,
) -> None:
    """Verify DIR, check its gates, write a model card and upload it to REPO.

    An upload that broke off goes on when the same command is given again. Limits are held against what `quantize` or
    `eval --record` measured; exit code 3 when one was passed. The token is HF_TOKEN, or that of `hf auth login`.
    """
    import outlierq

    done = outlierq.publish(
        folder,
        repository,
        base_model=base_model,
        licence=licence,
        outliers=outliers,
        limits=outlierq.Limits.of(max_kl, max_perplexity_increase, min_top1, min_task),
        public=public,
        update=update,
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
        told=lambda text: shared.say(text, quiet),
    )
    if done.sent is not None:
        sent = done.sent
        shared.on_page(lambda: f"Published: {sent.url} ({'private' if sent.private else 'public'})\n")
    if as_json:
        shared.print_json(done.to_dict())
    elif done.sent is None:
        typer.echo(_listing(done.files))
        typer.echo(f"\n{done.card}")
    else:
        typer.echo(f"published and compared: {done.sent.url} ({'private' if done.sent.private else 'public'})")


def _listing(files: Sequence[tuple[str, int]]) -> str:
    """What would be sent."""
    from outlierq.report.terminal import human_bytes

    width = max(len(name) for name, _ in files)
    lines = [f"  {name:<{width}}  {human_bytes(size):>9}" for name, size in files]
    return "\n".join([f"{len(files)} files, {human_bytes(sum(size for _, size in files))}:", *lines])
