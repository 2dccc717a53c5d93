"""A Hub id: the files of one commit, in the cache of huggingface_hub and under its rules for tokens and offline use.

Within a process huggingface_hub goes on with a download that broke off; files that had arrived whole stay in any case.
It compares sizes only, so weight files are held against the digests that the Hub names them by before they are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlierq.core.errors import SourceError
from outlierq.core.machine.threads import check_room
from outlierq.load.hub.content import check_cached
from outlierq.load.source.carried import TEMPLATE_FILES

# Weights as safetensors, and what is small: pickles and other frameworks' weights are never fetched.
WEIGHTS = "*.safetensors"
SMALL = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
FETCHED = (WEIGHTS, *SMALL)

# Subfolders hold other forms of the same weights (that of chat templates is fetched by itself), and "consolidated"
# files repeat them in the maker's own format.
REPEATED = ("*/*", "consolidated*", "*.bin.index.json")

# Of huggingface_hub for a download.
THREADS = 8

# Seconds that a busy Hub may ask to wait before it is asked again.
LONGEST_WAIT = 300

OFFLINE_HINT = "use a local folder, or fetch the model once with a network and run with HF_HUB_OFFLINE=1"


@dataclass(frozen=True)
class Listed:
    """A file as the Hub lists it. digest: sha256 in large storage, the blob id when git itself holds it; hex."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files of one commit. names: of all; weights: the safetensors files at the top."""

    repository: str
    commit: str
    names: tuple[str, ...]
    weights: Mapping[str, Listed]


def snapshot(
    repository: str, revision: str | None, *, trust_remote_code: bool = False, weights: bool = True
) -> tuple[Path, str]:
    """The local folder of one commit and that commit's sha.

    revision: branch, tag or commit; None is the default branch. weights: fetch and check them, too. SourceError when
    the repository is unknown or closed to this user, neither cached nor reachable, or when a file is damaged.
    """
    check_room(THREADS)
    patterns = [*(FETCHED if weights else SMALL), *(["*.py"] if trust_remote_code else [])]
    with asking(repository, revision):
        folder = _download(repository, revision, patterns, REPEATED)
        # The cache names a snapshot's folder after the commit that the revision stood for.
        _download(repository, folder.name, [TEMPLATE_FILES], ())
    if weights:
        check_cached(sorted(folder.glob(WEIGHTS)))
    return folder, folder.name


def _download(repository: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str]) -> Path:
    """The cache's folder of one commit, once it holds all files that fit the patterns."""
    from huggingface_hub import is_offline_mode, snapshot_download

    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=list(patterns),
        ignore_patterns=list(ignored),
        max_workers=THREADS,
        # huggingface_hub 1 does not see by itself that it cannot list the files of a commit, then.
        local_files_only=is_offline_mode(),
    )
    return Path(folder)


def listing(repository: str, revision: str | None) -> Listing:
    """What a revision stands for now: its commit, and the sizes and digests of its files. SourceError as above."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with asking(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    names = tuple(sorted(file.rfilename for file in info.siblings))
    fetched = set(filter_repo_objects(names, allow_patterns=[WEIGHTS], ignore_patterns=list(REPEATED)))
    weights = {
        file.rfilename: Listed(file.rfilename, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in info.siblings
        if file.rfilename in fetched
    }
    return Listing(repository, info.sha, names, weights)


@contextmanager
def asking(repository: str, revision: str | None = None, hint: str = OFFLINE_HINT) -> Iterator[None]:
    """What the Hub or the line to it says against a request, as a SourceError. hint: for a line that breaks."""
    from huggingface_hub import errors

    _bound_waits()
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{repository} is gated: its owner must grant you access first",
            hint=f"ask at https://huggingface.co/{repository}, then log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{repository} has no revision {revision}", hint="give a branch, a tag or a commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{repository} is neither a path here nor a repository that you may read on the Hub",
            hint="check the spelling; for a private repository log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            f"{repository} is not in the cache and the Hub cannot be reached", hint=OFFLINE_HINT
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceError(
            f"HF_HUB_OFFLINE is set, so nothing of {repository} can be asked of the Hub", hint="unset it"
        ) from error
    except errors.HFValidationError as error:
        raise SourceError(f"{repository} is no valid Hub id: {error}", hint="a Hub id is written owner/name") from error
    except (errors.HTTPError, OSError) as error:
        raise SourceError(f"{repository} could not be fetched from the Hub: {error}", hint=hint) from error
    except ValueError as error:  # no JSON: a page to log in to a network, for example
        raise SourceError(
            f"what answered for {repository} is not the Hub: {error}",
            hint="log in to this network first (or look at HF_ENDPOINT and the proxy), and run the same command again",
        ) from error


def _bound_waits() -> None:
    """Let requests to the Hub fail when it asks for a long wait: huggingface_hub would wait a day, five times."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    if _refuse_long_wait not in hooks["response"]:
        client.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_wait]}


def _refuse_long_wait(response: Any) -> None:
    """SourceError when the Hub takes no more requests, and will not for long. response: of the HTTP client."""
    if response.status_code != 429:
        return
    said = [response.headers.get("retry-after", ""), *re.findall(r"\bt=(\d+)", response.headers.get("ratelimit", ""))]
    seconds = max((int(text) for text in said if text.isdecimal()), default=0)
    if seconds > LONGEST_WAIT:
        raise SourceError(
            f"the Hub takes no more requests from here for {seconds:,} seconds (429, too many requests)",
            hint="log in with `hf auth login` or set HF_TOKEN, which allows more; or run the same command again later",
        )
