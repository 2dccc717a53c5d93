"""What is written for the Hub beside a checkpoint: the card, its pictures, and reports without local paths."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from outlierq.core.errors import PublishError
from outlierq.core.machine.untrusted import brief, json_object
from outlierq.core.measured.outliers import OutlierReport
from outlierq.core.report import REPORT_NAME
from outlierq.pipeline.fitting.goal import cache_size
from outlierq.pipeline.publish import (
    CARD,
    REPOSITORY,
    Candidate,
    public_report,
    scrubbed_json,
    with_record_of,
    without_paths,
)
from outlierq.report.model_card import CACHED, Beside, CardPicture, metadata, model_card, source_metadata

NONE = "none"
WEIGHTS = (".safetensors", ".gguf")
OUTLIERS, OUTLIER_PAGE = "outliers.json", "outliers.html"


def hub_files(
    candidate: Candidate, repository: str, base_model: str | None, licence: str | None, outliers: Path | None
) -> dict[str, bytes]:
    """The files that are not taken from the folder as they are: the card, pictures, reports without local paths."""
    base = _base_model(candidate, base_model)
    report = public_report(candidate.report, repository, base)
    head = metadata(
        report, repository, base, source_metadata(candidate.folder), tuple(candidate.files), licence=licence
    )
    pictures, drawn = _pictures(candidate, outliers)
    card = model_card(
        report,
        repository,
        base,
        head,
        gate=candidate.gate,
        clients=candidate.clients,
        beside=Beside(pictures, *_in_memory(candidate)),
    )
    ours = {CARD: card.encode(), **drawn}
    if OUTLIERS in candidate.files:
        ours[OUTLIERS] = scrubbed_json(candidate.files[OUTLIERS].read_bytes())
    report = with_record_of(report, candidate.files, ours)
    return ours | {REPORT_NAME: (json.dumps(report.to_dict(), indent=1) + "\n").encode()}


def _base_model(candidate: Candidate, given: str | None) -> str | None:
    """The Hub id of the original: as given, or what the report says when that is one."""
    if given == NONE:
        return None
    if given is not None:
        if not REPOSITORY.fullmatch(given):
            raise PublishError(
                f"--base-model {brief(repr(given))} is no Hub id", hint="a Hub id is written owner/name, or say none"
            )
        return given
    source = candidate.report.model
    if REPOSITORY.fullmatch(source) and not Path(source).exists() and not source.endswith(".gguf"):
        return source
    raise PublishError(
        f"the checkpoint was made from {source}, which is no Hub id, so the card cannot name its original",
        hint="say which it is: --base-model owner/name (or --base-model none for a model of your own)",
    )


def _in_memory(candidate: Candidate) -> tuple[int, int | None]:
    """Bytes of the weights, and of a cache beside them where config.json says how large it is."""
    weights = sum(path.stat().st_size for name, path in candidate.files.items() if name.endswith(WEIGHTS))
    file = candidate.files.get("config.json")
    config = {} if file is None else json_object(file.read_bytes(), "config.json", PublishError)
    text = config.get("text_config") or config
    known = all(isinstance(text.get(name), int) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    return weights, cache_size(config, CACHED) if known else None


def _pictures(candidate: Candidate, outliers: Path | None) -> tuple[list[CardPicture], dict[str, bytes]]:
    """The pictures of an outlier report, when there is one: for the card, and the bytes of their files by name."""
    path = outliers or candidate.files.get(OUTLIERS)
    if path is None:
        return [], {}
    from outlierq.report.pages.outlier_page import page, write_pictures

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
