"""Publishing: what must hold before a checkpoint leaves the house, and the upload to the Hub.

The upload is one call of huggingface_hub on a folder of links to the files, so that the card can be another one than
the source's README.md and nothing in the checkpoint's folder is written. An upload that broke off goes on when it is
started again: what the Hub has is not sent twice (by content, in huggingface_hub). Afterwards the Hub's list of files
is compared with ours, hash by hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar, cast

from outlierq import __version__
from outlierq.core.errors import OutlierqError, PublishError
from outlierq.core.limits import Limits
from outlierq.core.machine.record import bytes_entry, signed
from outlierq.core.report import REPORT_NAME, Report
from outlierq.load import open_checkpoint
from outlierq.load.source.carried import carried_names
from outlierq.load.source.folder import INDEX, inside
from outlierq.pipeline.measuring.cache import content_hash
from outlierq.pipeline.measuring.measure import judge, read_report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
CARD = "README.md"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A path of this machine: from a root, of two parts or more, so that "and/or" and "3 MB/s" are none; or from a home, a
# drive, a folder above, another machine. Parts but the last may hold spaces. A web address is none.
PARTS = r"(?:[^/\\\n,;:'\"]+[/\\]+)"
LAST_PART = r"[^\s/\\,;:'\"]+"
LOCAL_PATH = re.compile(
    rf"(?:file://|\b[\w.+-]+@[\w.-]+:(?=[/~]))[/\\~]*{PARTS}*{LAST_PART}"
    rf"|(?<![\w./\\~-])(?:~(?:[A-Za-z_][\w.-]*)?|[A-Za-z]:|\.{{1,2}})[/\\]+{PARTS}*{LAST_PART}"
    rf"|(?<![\w./\\~-])(?:/(?!/)|\\\\){PARTS}+{LAST_PART}"
)
# Left from an earlier state of the repository, these would be loaded together with the new ones.
STALE = ("*.safetensors", "*.safetensors.index.json")
RESUME_HINT = "run the same command again: what has arrived is not sent a second time"


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be published. files: what is uploaded, by name. left_out: what stays behind.

    gate: the rows of every limit that was kept. clients: what is known to load it.
    """

    folder: Path
    report: Report
    files: Mapping[str, Path]
    left_out: tuple[str, ...]
    gate: tuple[dict[str, Any], ...]
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Sent:
    """What an upload did. existed: the repository was there before."""

    url: str
    commit: str
    private: bool
    existed: bool


def check(folder: Path, limits: Limits, *, trust_remote_code: bool = False) -> Candidate:
    """Verify a folder that `quantize` wrote, and hold it against its gates.

    limits: further limits, on what was measured and recorded. PublishError names every fault of the checkpoint;
    GateError holds the table of all limits when one was passed.
    """
    report = read_report(folder)
    faults = _faults(folder, trust_remote_code)
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise PublishError(
            f"{folder} is damaged, {len(faults)} fault(s):\n{listed}", hint="write it again with `outlierq quantize`"
        )
    rows = _gate(folder, report, limits, trust_remote_code)
    files = {name: inside(folder, name) for name in published_names(folder, trust_remote_code)}
    tops = {name.partition("/")[0] for name in files}
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in tops))
    return Candidate(folder, report, files, left_out, tuple(rows), tuple(_clients(report)))


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes. public: of a new repository. update: replace what an existing one holds."""

    repository: str
    public: bool = False
    update: bool = False


@dataclass(frozen=True)
class Publication:
    """What was sent, or would be. files: (name, bytes). sent: None when nothing was sent."""

    target: Target
    files: Sequence[tuple[str, int]]
    card: str
    left_out: tuple[str, ...]
    sent: Sent | None = None

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        files = [{"name": name, "bytes": size} for name, size in self.files]
        values = {"repository": self.target.repository, "files": files}
        if self.sent is not None:
            return values | vars(self.sent)
        return values | {"private": not self.target.public, "card": self.card, "left_out": self.left_out}


def publish(
    folder: Path,
    target: Target,
    limits: Limits,
    *,
    write: Callable[[Candidate], Mapping[str, bytes]],
    dry_run: bool = False,
    trust_remote_code: bool = False,
    told: Callable[[str], Any] = lambda text: None,
) -> Publication:
    """Verify a folder, hold it against its gates, write what belongs to it on the Hub, and upload all of it.

    write: makes the card and other files of a candidate. dry_run: nothing is sent, no network is used. told: is given
    a sentence at each step.
    """
    check_repository(target.repository)
    told(f"verifying {folder} ...")
    candidate = check(folder, limits, trust_remote_code=trust_remote_code)
    if candidate.report.evaluation is None:
        told("note: nothing was measured on this checkpoint, and its card says so (`eval --record`)")
    written = write(candidate)
    ready = Publication(target, sizes(candidate.files, written), written[CARD].decode(), candidate.left_out)
    if dry_run:
        return ready
    told(f"uploading {len(ready.files)} files to {target.repository} ...")
    with staged(candidate, written) as staging:
        sent = upload(staging, target.repository, private=not target.public, update=target.update)
    if target.public and sent.private:
        told("note: the repository was private before and stays so; its settings on the Hub change that")
    return replace(ready, sent=sent)


def public_report(report: Report, repository: str, base_model: str | None) -> Report:
    """The report without paths of this machine: of each only the last part is left."""
    cleaned = Report.from_dict(without_paths(report.to_dict()))
    return replace(cleaned, model=base_model or cleaned.model, out=repository)


def with_record_of(report: Report, files: Mapping[str, Path], written: Mapping[str, bytes]) -> Report:
    """The report, signed for what is uploaded: files as they are in the folder, and those that are written instead."""
    record = report.record
    if record is None:
        return report
    entries = {name: entry for name, entry in record["files"].items() if name in files or name in written}
    entries |= {name: bytes_entry(content) for name, content in written.items() if name != REPORT_NAME}
    return signed(report, {**record, "files": entries})


def without_paths(value: T) -> T:
    """Plain values in which every local path is its last part."""
    cleaned: object = value
    if isinstance(value, str):
        cleaned = LOCAL_PATH.sub(lambda path: re.split(r"[/\\]", path[0].rstrip("/\\"))[-1], value)
    elif isinstance(value, Mapping):
        cleaned = {without_paths(key): without_paths(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        cleaned = [without_paths(item) for item in value]
    return cast("T", cleaned)


@contextmanager
def staged(candidate: Candidate, written: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder of links to the files of the checkpoint, with those that are written for the Hub instead or beside."""
    with TemporaryDirectory(prefix="outlierq-publish-") as name:
        staging = Path(name)
        for file, path in candidate.files.items():
            if file not in written:
                (staging / file).parent.mkdir(exist_ok=True)
                (staging / file).symlink_to(path)
        for file, content in written.items():
            (staging / file).write_bytes(content)
        yield staging


def upload(
    staging: Path, repository: str, *, private: bool = True, update: bool = False, message: str | None = None
) -> Sent:
    """Send every file of `staging` to a repository, which is made when there is none, and compare what arrived.

    The token and the endpoint are those of huggingface_hub (HF_TOKEN or `hf auth login`, HF_ENDPOINT).
    private: of a new repository; an existing public one is refused when it is set. update: replace what an existing
    repository holds (its history stays). PublishError says what the Hub did not take, and how to go on.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="outlierq", library_version=__version__)
    files = {str(path.relative_to(staging)): path for path in sorted(staging.rglob("*")) if path.is_file()}
    with _told(repository):
        api.whoami()
        held = _held(api, repository)
        existing = _visibility(api, repository) if held is not None else None
        _refuse_existing(repository, held or {}, existing, files, private=private, update=update)
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=staging,
            commit_message=message or f"Upload with outlierq {__version__}",
            delete_patterns=list(STALE) if held and update else None,
        )
        arrived = _held(api, repository) or {}
    wrong = sorted(name for name, path in files.items() if not _same(arrived.get(name), path))
    if wrong:
        raise PublishError(f"{repository} does not hold what was sent: {', '.join(wrong)}", hint=RESUME_HINT)
    is_private = private if existing is None else existing
    return Sent(f"{api.endpoint}/{repository}", done.oid, is_private, existing is not None)


def check_repository(repository: str) -> None:
    """PublishError when this cannot be the name of a repository."""
    if not REPOSITORY.fullmatch(repository):
        raise PublishError(f"{repository!r} is no name of a repository", hint="write owner/name")


def _faults(folder: Path, trust_remote_code: bool) -> list[str]:
    """What is wrong with a checkpoint, each as a sentence."""
    from outlierq.pipeline.verify import verify

    faults = verify(str(folder), trust_remote_code=trust_remote_code).faults
    return [f"{fault.tensor}: {fault.what}" if fault.tensor else fault.what for fault in faults]


def _gate(folder: Path, report: Report, limits: Limits, trust_remote_code: bool) -> list[dict[str, Any]]:
    """Rows of every limit: those that were judged, the recipe's, and further ones. GateError when one was passed."""
    from outlierq.core.limits import GateRow, raise_if_failed
    from outlierq.recipe import Gate

    asked = report.settings.get("gate")
    of_recipe = Gate.model_validate(asked).limits if asked else Limits()
    measured = report.evaluation
    if measured is None:
        if of_recipe or limits:
            raise PublishError(
                f"{folder} has a gate, but nothing was measured on it",
                hint=f"measure first: outlierq eval {folder} --reference ORIGINAL --record",
            )
        return []
    recorded = (measured.get("content_hash") or {}).get("model")
    if recorded != content_hash(open_checkpoint(str(folder), trust_remote_code=trust_remote_code)):
        raise PublishError(
            f"the results in {folder / REPORT_NAME} were measured on other bytes than the folder holds now",
            hint=f"measure again: outlierq eval {folder} --reference ORIGINAL --record",
        )
    rows = list(measured.get("gate") or [])
    rows += [row for bounds in (of_recipe, limits) for row in judge(dict(measured), bounds)["gate"] if row not in rows]
    raise_if_failed([GateRow(row["name"], row["value"], row["relation"], row["limit"]) for row in rows])
    return rows


def _clients(report: Report) -> Sequence[str]:
    """What is known to load it: as the run said, or else what is known of the format with these schemes."""
    if report.clients:
        return report.clients
    from outlierq.export import format_type
    from outlierq.recipe import Recipe

    recipe = Recipe.model_validate(report.settings)
    asked = ((row, recipe.scheme_for(row.site, "bfloat16")) for row in report.rows)
    schemes = {replace(scheme, group_size=row.group_size) for row, scheme in asked if scheme is not None}
    return format_type(recipe.export.format).clients(schemes)


def published_names(folder: Path, trust_remote_code: bool = False) -> list[str]:
    """Names below the folder of config.json, the weights, and what travels with them; nothing else leaves the house."""
    weights = {path.name for path in open_checkpoint(str(folder), trust_remote_code=trust_remote_code).weight_files}
    lists = {name for name in ("config.json", INDEX) if (folder / name).is_file()}
    return sorted({*carried_names(folder), *weights, *lists})


def _held(api: HfApi, repository: str) -> dict[str, tuple[int, str]] | None:
    """Size and hash of each file of a repository (sha256 of large files, git's blob id of others); None without it."""
    from huggingface_hub import RepoFile, errors

    try:
        entries = list(api.list_repo_tree(repository, recursive=True))
    except errors.RepositoryNotFoundError:
        return None
    return {e.path: (e.size, e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if isinstance(e, RepoFile)}


def _visibility(api: HfApi, repository: str) -> bool:
    """Whether an existing repository is private."""
    return bool(api.model_info(repository).private)


def _refuse_existing(
    repository: str,
    held: Mapping[str, tuple[int, str]],
    existing: bool | None,
    files: Mapping[str, Path],
    *,
    private: bool,
    update: bool,
) -> None:
    """Refuse to change what others may rely on, or to show what was meant to stay private."""
    if existing is False and private:
        raise PublishError(
            f"{repository} exists and is public; what is uploaded there is public at once",
            hint="give --public if that is meant, or choose another name",
        )
    other = [name for name, entry in held.items() if name != ".gitattributes" and not _matches(name, entry, files)]
    if other and not update:
        shown = ", ".join(sorted(other)[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        raise PublishError(
            f"{repository} exists and holds {len(other)} file(s) that are not these: {shown}",
            hint="give --update to replace them in a new commit, or choose another name",
        )


def _matches(name: str, entry: tuple[int, str], files: Mapping[str, Path]) -> bool:
    return name in files and _same(entry, files[name])


def _same(entry: tuple[int, str] | None, path: Path) -> bool:
    """Whether the Hub's size and hash are those of the file."""
    if entry is None or entry[0] != path.stat().st_size:
        return False
    is_sha256 = len(entry[1]) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(f"blob {entry[0]}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest() == entry[1]


@contextmanager
def _told(repository: str) -> Iterator[None]:
    """What huggingface_hub raises, as an error that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except OutlierqError:
        raise
    except errors.LocalTokenNotFoundError as error:
        raise PublishError(
            "there is no token for the Hub", hint="log in with `hf auth login`, or set HF_TOKEN to one that may write"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise PublishError("HF_HUB_OFFLINE is set, so nothing can be uploaded", hint="unset it") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repository, error) from error
    # ValueError: a card whose metadata the Hub rejects; RuntimeError: what the Xet client raises.
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PublishError(f"the upload to {repository} broke off: {error}", hint=RESUME_HINT) from error


def _refused(repository: str, error: Any) -> PublishError:
    """An answer of the Hub that is an error."""
    code = error.response.status_code if error.response is not None else None
    if code == 401:
        return PublishError(
            "the Hub does not know this token", hint="log in again with `hf auth login`, or set HF_TOKEN to a valid one"
        )
    if code == 403:
        return PublishError(
            f"this token may not write to {repository}", hint="use one with the role `write` for that owner"
        )
    return PublishError(f"the upload to {repository} broke off: {error}", hint=RESUME_HINT)


def scrubbed_json(content: bytes) -> bytes:
    """A JSON file of ours without paths of this machine."""
    return (json.dumps(without_paths(json.loads(content)), indent=1) + "\n").encode()


def sizes(files: Mapping[str, Path], written: Mapping[str, bytes]) -> Sequence[tuple[str, int]]:
    """What an upload would send: names and bytes, in the order of the names."""
    bytes_of = {name: path.stat().st_size for name, path in files.items()}
    return sorted((bytes_of | {name: len(content) for name, content in written.items()}).items())
