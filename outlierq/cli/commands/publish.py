"""Upload a checkpoint that outlierq wrote, with its card, when it is sound and its gate passed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outlierq.cli import shared

if TYPE_CHECKING:
    from outlierq.pipeline.publish import Candidate
    from outlierq.report.model_card import CardPicture

EXAMPLES = (
    "Examples:\n\n"
    "  outlierq publish ./SmolLM2-135M-W4 me/SmolLM2-135M-W4 --dry-run\n\n"
    "  outlierq publish ./out me/SmolLM2-135M-W4 --max-kl 0.05 --base-model HuggingFaceTB/SmolLM2-135M --public"
)
NONE = "none"
OUTLIERS, OUTLIER_PAGE = "outliers.json", "outliers.html"


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
    from outlierq.pipeline import publish

    limits = shared.gate_limits(max_kl, max_perplexity_increase, min_top1, min_task)
    publish.check_repository(repository)
    shared.say(f"verifying {folder} ...", quiet)
    candidate = publish.check(folder, limits, trust_remote_code=trust_remote_code)
    if candidate.report.evaluation is None:
        shared.say("note: nothing was measured on this checkpoint, and its card says so (`eval --record`)", quiet)
    written = _written(candidate, repository, base_model, licence, outliers)
    files = publish.sizes(candidate.files, written)
    result = {"repository": repository, "files": [{"name": name, "bytes": size} for name, size in files]}
    if dry_run:
        card = written[publish.CARD].decode()
        if as_json:
            shared.print_json(result | {"private": not public, "card": card, "left_out": candidate.left_out})
        else:
            typer.echo(_listing(files))
            typer.echo(f"\n{card}")
        return
    shared.say(f"uploading {len(files)} files to {repository} ...", quiet)
    with publish.staged(candidate, written) as staging:
        sent = publish.upload(staging, repository, private=not public, update=update)
    if public and sent.private:
        shared.say("note: the repository was private before and stays so; its settings on the Hub change that", quiet)
    if as_json:
        shared.print_json(result | vars(sent))
    else:
        typer.echo(f"published and compared: {sent.url} ({'private' if sent.private else 'public'})")


def _written(
    candidate: Candidate, repository: str, base_model: str | None, licence: str | None, outliers: Path | None
) -> dict[str, bytes]:
    """The files that are not taken from the folder as they are: the card, pictures, reports without local paths."""
    from outlierq.core.report import REPORT_NAME
    from outlierq.pipeline import publish
    from outlierq.report.model_card import metadata, model_card, source_metadata

    base = _base_model(candidate, base_model)
    report = publish.public_report(candidate.report, repository, base)
    head = metadata(
        report, repository, base, source_metadata(candidate.folder), tuple(candidate.files), licence=licence
    )
    pictures, drawn = _pictures(candidate, outliers)
    card = model_card(report, repository, base, head, gate=candidate.gate, clients=candidate.clients, pictures=pictures)
    ours = {publish.CARD: card.encode(), REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()}
    if OUTLIERS in candidate.files:
        ours[OUTLIERS] = publish.scrubbed_json(candidate.files[OUTLIERS].read_bytes())
    return ours | drawn


def _base_model(candidate: Candidate, given: str | None) -> str | None:
    """The Hub id of the original: as given, or what the report says when that is one."""
    from outlierq.core.errors import PublishError
    from outlierq.pipeline.publish import REPOSITORY

    if given is not None:
        return None if given == NONE else given
    source = candidate.report.model
    if REPOSITORY.fullmatch(source) and not Path(source).exists() and not source.endswith(".gguf"):
        return source
    raise PublishError(
        f"the checkpoint was made from {source}, which is no Hub id, so the card cannot name its original",
        hint="say which it is: --base-model owner/name (or --base-model none for a model of your own)",
    )


def _pictures(candidate: Candidate, outliers: Path | None) -> tuple[list[CardPicture], dict[str, bytes]]:
    """The pictures of an outlier report, when there is one: for the card, and the bytes of their files by name."""
    path = outliers or candidate.files.get(OUTLIERS)
    if path is None:
        return [], {}
    from tempfile import TemporaryDirectory

    from outlierq.core.errors import PublishError
    from outlierq.core.machine.untrusted import json_object
    from outlierq.core.outliers import OutlierReport
    from outlierq.pipeline.publish import without_paths
    from outlierq.report.model_card import CardPicture
    from outlierq.report.outlier_page import page, write_pictures

    path = path / OUTLIERS if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PublishError(f"{path} cannot be read: {error}", hint="give the JSON of `outlierq detect -o`") from error
    report = OutlierReport.from_dict(without_paths(json_object(raw, str(path), PublishError)))
    with TemporaryDirectory(prefix="outlierq-pictures-") as work:
        drawn = {file.name: file.read_bytes() for file in write_pictures(report, Path(work))}
    titles = {name: name.removeprefix("outliers-").removesuffix(".png").replace("-", " ") for name in drawn}
    if OUTLIER_PAGE in candidate.files:  # it may name paths of this machine
        drawn[OUTLIER_PAGE] = page(report).encode()
    return [CardPicture(name, title) for name, title in titles.items()], drawn


def _listing(files: list[tuple[str, int]]) -> str:
    """What would be sent."""
    from outlierq.report.terminal import human_bytes

    width = max(len(name) for name, _ in files)
    lines = [f"  {name:<{width}}  {human_bytes(size):>9}" for name, size in files]
    return "\n".join([f"{len(files)} files, {human_bytes(sum(size for _, size in files))}:", *lines])
