"""A Hub id: the files of one commit, in the cache of huggingface_hub and under its rules for tokens and offline use.

Within a process huggingface_hub goes on with a download that broke off; files that had arrived whole stay in any case.
It compares sizes only, so weight files are held against the digests that the Hub names them by before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from outlierq.core.machine.hub import asking
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
