"""A Hub id: the files of one commit, in the cache of huggingface_hub and under its rules for tokens and offline use."""

from __future__ import annotations

from pathlib import Path

from outlierq.core.errors import SourceError

# Weights as safetensors, and what is small: pickles and other frameworks' weights are never fetched.
WANTED = (
    "*.safetensors",
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

# Subfolders hold other forms of the same weights, and "consolidated" files repeat them in the maker's own format.
UNWANTED = ("*/*", "consolidated*", "*.bin.index.json")

OFFLINE_HINT = "use a local folder, or fetch the model once with a network and run with HF_HUB_OFFLINE=1"


def snapshot(repository: str, revision: str | None, *, trust_remote_code: bool = False) -> tuple[Path, str]:
    """The local folder of one commit and that commit's sha.

    revision: branch, tag or commit; None is the default branch. SourceError when the repository is unknown or closed to
    this user, or when it is neither cached nor reachable.
    """
    from huggingface_hub import errors, snapshot_download

    wanted = [*WANTED, "*.py"] if trust_remote_code else list(WANTED)
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=list(UNWANTED))
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
    except errors.HFValidationError as error:
        raise SourceError(f"{repository} is no valid Hub id: {error}", hint="a Hub id is written owner/name") from error
    except (errors.HTTPError, OSError) as error:
        raise SourceError(f"{repository} could not be fetched from the Hub: {error}", hint=OFFLINE_HINT) from error
    # The cache names a snapshot's folder after the commit that the revision stood for.
    return Path(folder), Path(folder).name
